"""FineVision: parquet files in a folder for each config, with lists of images, of {user, assistant} and of ratings.

The order of columns, and of the fields of a text, differs from config to config, so everything is read by name.
"""

import math
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.conversation import conversation_record
from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    clean_text,
)
from data_pipelines.prepare.importers.parquet_rows import parquet_files, parquet_part

_COLUMNS = ("images", "texts")
QUALITIES = ("relevance", "image_correspondence", "visual_dependency", "formatting")
_OPTIONAL = ("source", *(f"{quality}_{kind}" for quality in QUALITIES for kind in ("ratings", "min")))


def finevision_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file."""
    files = parquet_files(source, _COLUMNS)
    return [parquet_part(file, source, _sample, _COLUMNS, _OPTIONAL) for file in files]


def _sample(row: dict[str, Any], name: str, config: str) -> ImportedSample:
    texts = row["texts"]
    if not texts:
        raise ValueError("no texts")
    turns = []
    for number, text in enumerate(texts):
        question, answer = clean_text(text["user"]), clean_text(text["assistant"])
        if not question or not answer:
            raise ValueError(f"texts[{number}] has no {'answer' if question else 'question'}")
        turns += [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    images = [image_bytes(image, f"images[{number}]") for number, image in enumerate(row["images"] or [])]
    record, files = conversation_record(turns, images)
    return ImportedSample(name, record, files, columns=rating_columns(row), config=config)


def rating_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The source and, of each quality, the ratings of the turns and the lowest; a rating that is not known is None."""
    columns: dict[str, Any] = {"source": row.get("source")}
    for quality in QUALITIES:
        ratings = row.get(f"{quality}_ratings")
        known = [_rating(value) for value in ratings or []]
        columns[f"{quality}_ratings"] = known
        lowest = _rating(row.get(f"{quality}_min"))
        columns[f"{quality}_min"] = min((r for r in known if r is not None), default=None) if lowest is None else lowest
    return columns


def _rating(value: Any) -> int | None:
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    return int(value)
