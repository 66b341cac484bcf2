"""BAGEL's three forms: parquet of (image, captions), of (image_list, instruction_list), and JSON lines for its VLM."""

from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.captions import json_captions
from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    clean_text,
)
from data_pipelines.prepare.importers.llava_json import llava_json_parts
from data_pipelines.prepare.importers.parquet_rows import parquet_columns, parquet_files, parquet_part

T2I_COLUMNS = ("image", "captions")
EDIT_COLUMNS = ("image_list", "instruction_list")


def bagel_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file, and those of the conversations."""
    parts = []
    for file in dict.fromkeys([*parquet_files(source, T2I_COLUMNS), *parquet_files(source, EDIT_COLUMNS)]):
        is_edit = "image_list" in parquet_columns(file)
        make, columns = (_edits, EDIT_COLUMNS) if is_edit else (_pair, T2I_COLUMNS)
        parts.append(parquet_part(file, source, make, columns))
    return [*parts, *llava_json_parts(source, options)]


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
