"""BAGEL's three forms: parquet of (image, captions), of (image_list, instruction_list), and JSON lines for its VLM."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.captions import json_captions
from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    Outcome,
    Reject,
    clean_text,
    outcome,
)
from data_pipelines.prepare.importers.llava_json import llava_json_parts
from data_pipelines.prepare.importers.parquet_rows import parquet_columns, parquet_files, parquet_rows
from data_pipelines.prepare.importers.source_files import config_name, relative_name

T2I_COLUMNS = ("image", "captions")
EDIT_COLUMNS = ("image_list", "instruction_list")


def bagel_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file, and those of the conversations."""
    parts = []
    for file in dict.fromkeys([*parquet_files(source, T2I_COLUMNS), *parquet_files(source, EDIT_COLUMNS)]):
        columns = EDIT_COLUMNS if "image_list" in parquet_columns(file) else T2I_COLUMNS
        parts.append(ImportPart(relative_name(file, source), partial(_read, file, columns, config_name(file, source))))
    return [*parts, *llava_json_parts(source, options)]


def _read(file: Path, columns: tuple[str, ...], config: str, start: int) -> Iterator[Outcome]:
    make = _edits if columns == EDIT_COLUMNS else _pair
    for number, row in parquet_rows(file, columns, (), start):
        if isinstance(row, Reject):
            yield row
        else:
            name = f"{file.name}#{number}"
            yield outcome(name, row, partial(make, row, name, config))


def _pair(row: dict[str, Any], name: str, config: str) -> ImportedSample:
    files = {"img0": image_bytes(row["image"], "image")}
    return ImportedSample(name, {}, files, json_captions(row["captions"]), config=config)


def _edits(row: dict[str, Any], name: str, config: str) -> ImportedSample:
    """A row of n images: n - 1 edits, each from an image to the next, with one or more wordings."""
    images, wordings = row["image_list"] or [], row["instruction_list"] or []
    if len(images) < 2 or len(wordings) != len(images) - 1:
        raise ValueError(f"{len(images)} images and {len(wordings)} instructions; there is one for each step")
    alternatives = []
    for step, texts in enumerate(wordings):
        values = [texts] if isinstance(texts, str) else texts or []
        instructions = [text for text in map(clean_text, values) if text]
        if not instructions:
            raise ValueError(f"instruction_list[{step}] has no text")
        images_shown = {"images": [f"img{step}"], "target": f"img{step + 1}"}
        alternatives += [{**images_shown, "text": text} for text in instructions]
    files = {f"img{i}": image_bytes(image, f"image_list[{i}]") for i, image in enumerate(images)}
    return ImportedSample(name, {"it2i": alternatives}, files, config=config)
