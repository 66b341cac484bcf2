"""A folder of images: a table beside them (metadata.csv or .jsonl with file_name and text), or a .txt for each."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.captions import caption_texts
from data_pipelines.prepare.importers.field_map import IMAGE_FIELDS, check_map, mapped_sample
from data_pipelines.prepare.importers.image_files import ImageFiles, images_beside, read_file
from data_pipelines.prepare.importers.item import ImportedSample, ImportOptions, ImportPart, Outcome, Reject, outcome
from data_pipelines.prepare.importers.json_items import BrokenItem, json_items
from data_pipelines.prepare.importers.source_files import relative_name, source_files
from data_pipelines.shards.images import EXTENSIONS

GUESSES = {
    "image": ("file_name", "image", "filename", "path", "filepath"),
    "caption": ("text", "caption", "prompt"),
    "question": ("question",),
    "answer": ("answer",),
    "source": ("source", "source_image", "input_image"),
    "target": ("target", "target_image", "edited_image", "output_image"),
    "instruction": ("instruction", "edit_instruction"),
}
"""Field -> names of columns that are taken for it without --map."""
MAX_FIELD_CHARS = 1 << 24
_Row = dict[str, Any]


def image_folder_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each table, or else for each folder that has images."""
    parts = []
    for file in source_files(source, (".csv", ".tsv", ".jsonl")):
        fields = dict(options.fields) or _guessed_map(next(_table_rows(file), {}))
        if fields:
            check_map(fields)
            images = images_beside(file, options.images)
            parts.append(ImportPart(relative_name(file, source), partial(_read_table, file, fields, images)))
    if parts:
        return parts
    folders = {path.parent for path in image_paths_below(source)}
    return [ImportPart(relative_name(folder, source), partial(_read_folder, folder)) for folder in sorted(folders)]


def image_paths_below(source: Path) -> list[Path]:
    """The image files of a folder, by their suffix."""
    return [path for path in source_files(source, ("",)) if path.suffix.lstrip(".").lower() in EXTENSIONS]


def _read_folder(folder: Path, start: int) -> Iterator[Outcome]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lstrip(".").lower() in EXTENSIONS)
    for path in files[start:]:
        yield outcome(path.name, {}, partial(_pair, path))


def _pair(path: Path) -> ImportedSample:
    """An image with the texts of the same name: name.txt, name.a.txt, ..."""
    texts = sorted([*path.parent.glob(f"{_escaped(path.stem)}.txt"), *path.parent.glob(f"{_escaped(path.stem)}.*.txt")])
    if not texts:
        raise ValueError(f"no {path.stem}.txt with its caption")
    captions = caption_texts([read_file(text).decode("utf-8-sig") for text in texts])
    return ImportedSample(path.name, {}, {"img0": read_file(path)}, captions)


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)


def _read_table(file: Path, fields: dict[str, str], images: ImageFiles, start: int) -> Iterator[Outcome]:
    for number, row in enumerate(_table_rows(file)):
        name = f"{file.name}#{number}"
        if number < start:
            continue
        if isinstance(row, Reject):
            yield row
        else:
            yield outcome(name, row, partial(_row_sample, row, fields, images, name))


def _row_sample(row: _Row, fields: dict[str, str], images: ImageFiles, name: str) -> ImportedSample:
    values = dict(row)
    for field in IMAGE_FIELDS:
        if field in fields and (path := row.get(fields[field])):
            values[fields[field]] = [images.read(one) for one in (path if isinstance(path, list) else [path])]
    sample = mapped_sample(values, fields, name)
    used = set(fields.values())
    sample.columns.update({k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float)})
    return sample


def _table_rows(file: Path) -> Iterator[Any]:
    """Rows of a table by the names of its columns, or a Reject for one that cannot be read."""
    if file.suffix == ".jsonl":
        for number, item in enumerate(json_items(file)):
            reason = item.reason if isinstance(item, BrokenItem) else "no object"
            yield item if isinstance(item, dict) else Reject(f"{file.name}#{number}", reason)
        return
    csv.field_size_limit(MAX_FIELD_CHARS)
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        number = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Reject(f"{file.name}#{number}", f"line {reader.line_num}: {error}")
            else:
                has_all = None not in row and None not in row.values()
                yield row if has_all else Reject(f"{file.name}#{number}", "another number of fields than the header")
            number += 1


def _guessed_map(row: Any) -> dict[str, str]:
    """The map that the names of columns suggest; empty where they suggest none."""
    if not isinstance(row, dict):
        return {}
    guesses = {field: next((n for n in names if n in row), "") for field, names in GUESSES.items()}
    fields = {field: name for field, name in guesses.items() if name}
    for needed in (("source", "target", "instruction"), ("image", "question", "answer"), ("image", "caption")):
        if set(needed) <= set(fields):
            return {field: fields[field] for field in needed}
    return {}
