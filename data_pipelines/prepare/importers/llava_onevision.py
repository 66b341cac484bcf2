"""LLaVA-OneVision-Data: parquet files in a folder for each config, with one image or none and a conversation."""

from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.conversation import conversation_record, conversation_turns
from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
)
from data_pipelines.prepare.importers.parquet_rows import parquet_files, parquet_part

_COLUMNS = ("image", "conversations")
_OPTIONAL = ("id", "data_source")


def llava_onevision_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file."""
    files = parquet_files(source, _COLUMNS)
    return [parquet_part(file, source, _sample, _COLUMNS, _OPTIONAL, "id") for file in files]


def _sample(row: dict[str, Any], name: str, config: str) -> ImportedSample:
    turns = conversation_turns(row["conversations"])
    image = row["image"]
    is_null = image is None or (isinstance(image, dict) and image.get("bytes") is None and not image.get("path"))
    record, files = conversation_record(turns, [] if is_null else [image_bytes(image, "image")])
    columns = {"source": row.get("data_source")}
    return ImportedSample(name, record, files, columns=columns, config=config)
