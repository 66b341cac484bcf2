"""X2I2 of OmniGen2: jsons/SUBSET/SUBSET.jsonl with paths relative to images/SUBSET, for edits, subjects and prompts."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.image_files import ImageFiles
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    Outcome,
    Reject,
    clean_text,
    outcome,
)
from data_pipelines.prepare.importers.json_items import BrokenItem, json_items
from data_pipelines.prepare.importers.omniedit import edit_record
from data_pipelines.prepare.importers.source_files import relative_name, source_files
from data_pipelines.shards.write import Record

IMAGE_TOKENS = ("<img>", "<|image", "<image")
"""In an instruction that has its images among its words (video_interleave), which no task of ours lays out."""
_NO_COLUMNS = ("instruction", "used_instruction", "input_images", "output_image", "image")


def x2i2_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each file of JSON lines whose items have an instruction and an output image."""
    parts = []
    for file in source_files(source, (".jsonl", ".json")):
        first = next(json_items(file), None)
        if isinstance(first, dict) and output_name(first) is not None:
            images = ImageFiles(*_image_folders(source, file, options.images))
            parts.append(ImportPart(relative_name(file, source), partial(_read, file, images)))
    return parts


def _image_folders(source: Path, file: Path, option: str) -> list[Path]:
    """Where the images of a subset may be: images/SUBSET (the hub), or beside its list."""
    subset, top = file.parent.name, source if source.is_dir() else source.parent
    roots = [Path(option)] if option else [top / "images", top.parent / "images", top, file.parent]
    return [folder for root in roots for folder in (root / subset, root)]


def _read(file: Path, images: ImageFiles, start: int) -> Iterator[Outcome]:
    for number, item in enumerate(json_items(file)):
        if number < start:
            continue
        name = f"{file.name}#{number}"
        if isinstance(item, BrokenItem):
            yield Reject(name, item.reason, 0 if item.ends else 1)
        elif not isinstance(item, dict):
            yield Reject(name, f"{type(item).__name__} where an object should stand")
        else:
            yield outcome(name, item, partial(_sample, item, name, file.parent.name, images))


def output_name(item: dict[str, Any]) -> str | None:
    """Key of the image to make: `output_image`, or `image` in the subset reflect."""
    if "output_image" in item:
        return "output_image"
    return "image" if "image" in item and "used_instruction" in item else None


def _sample(item: dict[str, Any], name: str, subset: str, images: ImageFiles) -> ImportedSample:
    key = item.get("used_instruction")
    instruction = clean_text(item[key] if isinstance(key, str) and key in item else item.get("instruction"))
    if any(token in instruction for token in IMAGE_TOKENS):
        raise ValueError("an instruction with images among its words, which no task lays out")
    target = output_name(item)
    if target is None:
        raise ValueError("no output image")
    references = item.get("input_images") or []
    paths = [*(references if isinstance(references, list) else [references]), item[target]]
    files = {f"img{number}": images.read(path) for number, path in enumerate(paths)}
    names, kind = list(files), clean_text(item.get("task_type"))
    record: Record = (
        edit_record([instruction] if instruction else [], names[:-1], names[-1], kind)
        if names[1:]
        else {"t2i": [{"target": names[-1], "text": instruction}]}
    )
    scalars = {key: value for key, value in item.items() if isinstance(value, str | int | float)}
    columns = {key: value for key, value in scalars.items() if key not in _NO_COLUMNS}
    return ImportedSample(name, record, files, columns=columns, config=subset)
