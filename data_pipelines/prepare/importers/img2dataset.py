"""Output of img2dataset, as LAION is downloaded: a tar of {key}.jpg, .txt, .json with a parquet file beside it.

What failed to download is in the parquet file alone; it is rejected with img2dataset's reason.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    Outcome,
    Reject,
    clean_text,
    outcome,
)
from data_pipelines.prepare.importers.parquet_rows import ExpansionError, safe_batch_rows
from data_pipelines.prepare.importers.source_files import relative_name, source_files
from data_pipelines.prepare.importers.tar_groups import tar_groups
from data_pipelines.shards.excluded import refuse_columns
from data_pipelines.shards.images import image_parts
from data_pipelines.shards.tar import Group

ALIASES = {
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score"),
    "similarity": ("similarity", "SIMILARITY"),
    "punsafe": ("punsafe", "PUNSAFE"),
    "pwatermark": ("pwatermark", "PWATERMARK"),
    "url": ("url", "URL"),
    "listed_width": ("WIDTH",),
    "listed_height": ("HEIGHT",),
    "language": ("LANGUAGE", "language"),
    "hash": ("hash", "HASH"),
}
"""Our column -> its names in the releases of LAION. WIDTH and HEIGHT are what LAION lists; img2dataset's own
original_width and original_height are measured."""
DROPPED = frozenset(("key", "status", "error_message", "exif", "caption", "TEXT", "text"))
"""Columns that the record has, or that say how the download went."""


def img2dataset_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each tar."""
    return [ImportPart(relative_name(file, source), partial(_read, file)) for file in source_files(source, (".tar",))]


def _read(tar: Path, start: int) -> Iterator[Outcome]:
    rows = _table_rows(tar.with_suffix(".parquet"))
    number = 0
    for group in tar_groups(tar, 0):
        key = group.source_id if isinstance(group, Reject) else group.key
        row = rows.pop(key, None)
        number += 1
        if number <= start:
            continue
        yield group if isinstance(group, Reject) else _outcome(group, row)
    for key, row in rows.items():
        number += 1
        if number > start:
            status, message = row.get("status"), row.get("error_message")
            reason = f"img2dataset: {status}: {message}" if status != "success" else "in the parquet, not in the tar"
            yield Reject(key, reason)


def _table_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of the parquet file of a tar by key; none where it is missing or broken, as the tar's JSON has them too.

    Raises UserError where its columns are those of the excluded set."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            refuse_columns(names, path)
            if "key" not in names:
                return {}
            rows: dict[str, dict[str, Any]] = {}
            for group in range(file.num_row_groups):
                batches = safe_batch_rows(file.metadata, group, names, 10_000)
                for batch in file.iter_batches(batches, row_groups=[group], use_threads=False):
                    rows |= {str(row["key"]): row for row in batch.to_pylist()}
            return rows
    except (OSError, pa.ArrowException, UnicodeDecodeError, ExpansionError):
        return {}


def _outcome(group: Group, row: dict[str, Any] | None) -> Outcome:
    try:
        values = json.loads(group.members["json"]) if "json" in group.members else {}
    except (ValueError, RecursionError):
        return Reject(group.key, "its JSON cannot be read")
    if not isinstance(values, dict):
        return Reject(group.key, "its JSON is no object")
    values = {**values, **(row or {})}
    return outcome(group.key, values, partial(_sample, group, values))


def _sample(group: Group, values: dict[str, Any]) -> ImportedSample:
    images = image_parts(group.members)
    if len(images) != 1:
        raise ValueError(f"{len(images)} images, where a pair has one; its members: {', '.join(group.members)}")
    caption = group.members["txt"].decode().strip() if "txt" in group.members else ""
    caption = caption or clean_text(next((values[name] for name in ("caption", "TEXT", "text") if name in values), ""))
    if not caption:
        raise ValueError("no caption")
    return ImportedSample(group.key, {}, {"img0": group.members[images[0]]}, (caption,), laion_columns(values))


def laion_columns(values: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row under our names. The first alias that has a value wins."""
    aliases = {alias for names in ALIASES.values() for alias in names}
    columns = {name: value for name, value in values.items() if name not in DROPPED | aliases}
    for name, names in ALIASES.items():
        if present := [alias for alias in names if alias in values]:
            columns[name] = next((values[alias] for alias in present if values[alias] is not None), None)
    return columns
