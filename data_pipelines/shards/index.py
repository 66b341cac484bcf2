"""The index beside a shard and the manifest of a folder: all that a planner needs, without opening a tar.

shard-000000.tar              plain WebDataset: one group {key}.json + {key}.NAME.webp per record
shard-000000.idx.parquet      one row per (record, task): where its bytes are, and how long each alternative is
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
"""Of so many shards at most, spread over the folder, the size is looked at when a manifest is read: every rank does it,
and a question takes a file server its time."""
INDEX_COLUMNS = pa.schema(
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
        ("part_names", pa.list_(pa.string())),
        ("part_offsets", pa.list_(pa.int64())),
        ("part_sizes", pa.list_(pa.int64())),
    ]
)
"""`offset` and `size` bound the record's group in the tar, `crc32` is of these bytes. `text_tokens`,
`supervised_tokens`, `context` (images shown) and `target` (image to make, -1 for none) have one entry per
alternative; images are numbered in the order of their names. `part_offsets` count from `offset`: a part is the bytes
[offset + part_offset, + part_size) of the tar. Rows of one task stand together, in the order of the tar."""


def index_path(tar: Path | str) -> Path:
    """The index of a local shard."""
    return Path(index_name(str(tar)))


def index_name(tar: str) -> str:
    """Name of the index beside a shard of that name."""
    return tar.removesuffix(".tar") + ".idx.parquet"


def read_columns(
    folder: str | Path,
    shard: str,
    task: str,
    columns: Sequence[str] | None = None,
    storage: ShardReader | None = None,
    version: str = "",
) -> pa.Table:
    """All index rows of one task of a shard, of all columns or of some.

    `version` is the index's hash in the manifest, by which a cached copy of a remote index is known. Raises UserError,
    and RunError where the store does not answer.
    """
    storage, url = storage or ShardReader(), join_url(folder, index_name(shard))
    try:
        source = pa.OSFile(url) if is_local(url) else pa.BufferReader(storage.read(url, version))
        # Rows of one task fill row groups of their own, so that the others are neither read nor decoded.
        file = pq.ParquetFile(source)
        if set(columns or INDEX_COLUMNS.names) - set(file.schema_arrow.names):
            raise UserError(f"{display_url(url)}: is of another version; index again")
        return file.read_row_groups(_groups_of(file, task), list(columns or INDEX_COLUMNS.names), use_threads=False)
    except StorageError as error:
        raise (RunError if not error.permanent else UserError)(str(error)) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{display_url(url)}: cannot be read ({error}); index again") from None


def read_manifest(folder: str | Path, storage: ShardReader | None = None) -> dict[str, Any]:
    """The manifest of a shard folder. Raises UserError where there is none, it is of another version, or a local shard
    or index that it lists is not there in full."""
    url = join_url(folder, MANIFEST)
    try:
        manifest = json.loads((storage or ShardReader()).read(url))
    except StorageError as error:
        told = f"{display_url(url)}: cannot read (no such file)" if error.missing else str(error)
        raise UserError(f"{told}; `emma-data index {display_url(folder)} --tokenizer FILE` makes it") from None
    except ValueError as error:
        raise UserError(f"{display_url(url)}: not valid JSON ({error}); `emma-data index` makes it anew") from None
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
    there, shards = set(os.listdir(folder)), manifest["shards"]
    for shard in shards:
        for name in (shard["name"], index_name(shard["name"])):
            if name not in there:
                raise UserError(
                    f"{folder / name}: missing, but {folder / MANIFEST} lists it; bring it back or index again"
                )
    for shard in shards[:: -(-len(shards) // SIZES_CHECKED) or 1]:
        tar = folder / shard["name"]
        if (size := tar.stat().st_size) != shard["bytes"]:
            raise UserError(f"{tar}: has {size} bytes, the manifest says {shard['bytes']}; copy it again")


def _groups_of(file: pq.ParquetFile, task: str) -> list[int]:
    """Row groups that hold a task."""
    number = file.schema_arrow.names.index("task")
    statistics = [file.metadata.row_group(i).column(number).statistics for i in range(file.num_row_groups)]
    return [i for i, s in enumerate(statistics) if s is not None and s.min == task]
