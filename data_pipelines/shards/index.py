"""Reads the index of a shard and the manifest of a folder. A planner needs only these and opens no tar.

shard-000000.tar              plain WebDataset: one group {key}.json + {key}.NAME.webp per record
shard-000000.idx.parquet      one row per (record, task): the range of its bytes, the length of each alternative
manifest.json                 schema, tokenizer, and each shard's size, rows, tags and hash
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emma_train.errors import RunError, UserError
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, is_local, join_url, local_path

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SIZES_CHECKED = 1000
"""The sizes of at most this many shards, spread over the folder, are checked when a manifest is read. Every rank does
so, and each check is a request to the file server."""
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("text_tokens", pa.list_(pa.int32())),
        ("supervised_tokens", pa.list_(pa.int32())),
        ("context", pa.list_(pa.list_(pa.int16()))),
        ("target", pa.list_(pa.int16())),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("tags", pa.list_(pa.string())),
    ]
)
"""`offset` and `size` bound the record's group in the tar, `crc32` is of these bytes. `text_tokens`,
`supervised_tokens`, `context` (images shown) and `target` (image to make, -1 for none) have one entry per
alternative; images are numbered in the order of their names. Rows of one task are consecutive, in the order of the tar.
Indexes of version 0.1 have three more columns, which nothing reads."""


def index_path(tar: Path | str) -> Path:
    """The index of a local shard."""
    return Path(index_name(str(tar)))


def index_name(tar: str) -> str:
    """Name or URL of the index of a shard."""
    return tar.removesuffix(".tar") + ".idx.parquet"


def read_columns(
    folder: str | Path,
    shard: str,
    task: str,
    columns: Sequence[str] | None = None,
    storage: ShardReader | None = None,
    version: str = "",
) -> pa.Table:
    """All index rows of one task of a shard; all columns, or those given.

    `version` is the hash of the index in the manifest, which identifies a cached copy of a remote index. Raises
    UserError, and RunError if an object store does not answer.
    """
    storage, url = storage or ShardReader(), join_url(folder, index_name(shard))
    try:
        source = pa.OSFile(url) if is_local(url) else pa.BufferReader(storage.read(url, version))
        # Each task has its own row groups, so that other tasks are neither read nor decoded.
        file = pq.ParquetFile(source)
        if set(columns or INDEX_SCHEMA.names) - set(file.schema_arrow.names):
            raise UserError(f"{display_url(url)}: is of another version; index again")
        return file.read_row_groups(_groups_of(file, task), list(columns or INDEX_SCHEMA.names), use_threads=False)
    except StorageError as error:
        raise (RunError if not error.permanent else UserError)(str(error)) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{display_url(url)}: cannot be read ({error}); index again") from None


def read_manifest(folder: str | Path, storage: ShardReader | None = None) -> dict[str, Any]:
    """The manifest of a shard folder. Raises UserError if it is missing or of another version, or if a local shard or
    index that it lists is missing or has another size."""
    url = join_url(folder, MANIFEST)
    try:
        manifest = json.loads((storage or ShardReader()).read(url))
    except StorageError as error:
        reason = f"{display_url(url)}: cannot read (no such file)" if error.missing else str(error)
        raise UserError(f"{reason}; `emma-data index {display_url(folder)} --tokenizer FILE` makes it") from None
    except ValueError as error:
        raise UserError(f"{display_url(url)}: not valid JSON ({error}); `emma-data index` writes it again") from None
    if manifest.get("unfinished"):
        raise UserError(f"{display_url(url)}: indexing was interrupted; run `emma-data index` again, it goes on")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{display_url(url)}: schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}; index again"
        )
    if is_local(str(folder)):
        _check_files(Path(local_path(str(folder))), manifest)
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    names, shards = set(os.listdir(folder)), manifest["shards"]
    for shard in shards:
        for name in (shard["name"], index_name(shard["name"])):
            if name not in names:
                raise UserError(
                    f"{folder / name}: missing, but {folder / MANIFEST} lists it; bring it back or index again"
                )
    for shard in shards[:: -(-len(shards) // SIZES_CHECKED) or 1]:
        tar = folder / shard["name"]
        if (size := tar.stat().st_size) != shard["bytes"]:
            raise UserError(f"{tar}: has {size} bytes, the manifest says {shard['bytes']}; copy it again")


def _groups_of(file: pq.ParquetFile, task: str) -> list[int]:
    """Row groups with rows of a task."""
    number = file.schema_arrow.names.index("task")
    statistics = [file.metadata.row_group(i).column(number).statistics for i in range(file.num_row_groups)]
    return [i for i, s in enumerate(statistics) if s is not None and s.min == task]
