"""Reads the index of a shard and the manifest of a folder. A planner needs only these and opens no tar.

shard-000000.tar              plain WebDataset: one group {key}.json + {key}.NAME.webp per record
shard-000000.idx.parquet      one row per (record, task): the range of its bytes, the length of each alternative
manifest.json                 schema, tokenizer, and each shard's size, rows, tags and hash
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emma_train.errors import RunError, UserError
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, is_file_name, is_local, join_url, local_path

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
MANIFEST_KEYS = {"tokenizer_sha256": str, "samples": dict, "shards": list}
SHARD_KEYS = {
    "name": str,
    "bytes": int,
    "sha256": str,
    "index_sha256": str,
    "rows": dict,
    "tags": dict,
    "left_out": int,
}
"""What a manifest, and the entry of a shard in it, have at least, with their types."""
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


CAPTIONS = "captions"
"""Column that only an index of a selection may have: a list of texts, each a further alternative of its row, after
those of the record (`record.caption_alternative`)."""


def index_path(tar: Path | str) -> Path:
    """The index of a local shard."""
    return Path(index_name(str(tar)))


def index_name(tar: str) -> str:
    """Name or URL of the index of a shard."""
    return tar.removesuffix(".tar") + ".idx.parquet"


def shard_url(folder: str | Path, entry: Mapping[str, Any]) -> str:
    """Path or URL of the tar of a shard, given by its entry in the manifest: it is in the folder, or, of a selection,
    where the entry's `tar` says, relative to the folder."""
    tar: str | None = entry.get("tar")
    if tar is None:
        return join_url(folder, entry["name"])
    return tar if "://" in tar else os.path.normpath(join_url(folder, tar))


def content_sha256(entry: Mapping[str, Any]) -> str:
    """Hash of the content that a shard of a manifest has: of its tar, or, of a selection, of the list of its rows."""
    sha256: str = entry["index_sha256"] if "tar" in entry else entry["sha256"]
    return sha256


def read_columns(
    folder: str | Path,
    shard: str,
    task: str,
    columns: Sequence[str] | None = None,
    storage: ShardReader | None = None,
    version: str = "",
) -> pa.Table:
    """All index rows of one task of a shard; all columns, or those given (CAPTIONS where there are any).

    `version` is the hash of the index in the manifest; an index with other content is refused. It also identifies a
    cached copy of a remote index. Raises UserError, and RunError if an object store does not answer.
    """
    storage, url = storage or ShardReader(), join_url(folder, index_name(shard))
    try:
        source = _open_index(url, storage, version)
        # Each task has its own row groups, so that other tasks are neither read nor decoded.
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
        wanted = [name for name in columns or INDEX_SCHEMA.names if name in names or name != CAPTIONS]
        if set(wanted) - set(names):
            raise UserError(f"{display_url(url)}: is of another version; index again")
        return file.read_row_groups(_groups_of(file, task), wanted, use_threads=False)
    except StorageError as error:
        raise (RunError if not error.permanent else UserError)(str(error)) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{display_url(url)}: cannot be read ({error}); index again") from None


def _open_index(url: str, storage: ShardReader, version: str) -> pa.NativeFile:
    """The index as a file, after its hash was compared; that of a local index once per process."""
    if not is_local(url):
        data = storage.read(url, version)
        if version and hashlib.sha256(data).hexdigest() != version:
            storage.forget(url, version)
            raise UserError(_other_content(url))
        return pa.BufferReader(data)
    path = local_path(url)
    if version and _local_sha256(path, os.stat(path).st_mtime_ns) != version:
        raise UserError(_other_content(url))
    return pa.OSFile(path)


def _other_content(url: str) -> str:
    return f"{display_url(url)}: content differs from its sha256 in {MANIFEST}; copy it again, or index again"


@cache
def _local_sha256(path: str, mtime_ns: int) -> str:
    """Hash of a local file; the argument `mtime_ns` makes a file that was written again be read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path, storage: ShardReader | None = None, check_files: bool = True) -> dict[str, Any]:
    """The manifest of a shard folder. Raises UserError if it is missing, of another version or of another form, or,
    where `check_files`, if a local shard or index that it lists is missing or has another size."""
    url = join_url(folder, MANIFEST)
    try:
        manifest = json.loads((storage or ShardReader()).read(url))
    except StorageError as error:
        reason = f"{display_url(url)}: cannot read (no such file)" if error.missing else str(error)
        raise UserError(f"{reason}; `emma-data index {display_url(folder)} --tokenizer FILE` makes it") from None
    except ValueError as error:
        raise UserError(f"{display_url(url)}: not valid JSON ({error}); `emma-data index` writes it again") from None
    except RecursionError:
        raise UserError(f"{display_url(url)}: is nested too deeply; `emma-data index` writes it again") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{display_url(url)}: is {_kind(manifest)}, no manifest; `emma-data index` writes it again")
    if manifest.get("unfinished"):
        raise UserError(f"{display_url(url)}: indexing was interrupted; run `emma-data index` again, it goes on")
    if manifest.get("schema") != SCHEMA_VERSION:
        raise UserError(
            f"{display_url(url)}: schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}; index again"
        )
    if problem := manifest_problem(manifest):
        raise UserError(f"{display_url(url)}: {problem}; `emma-data index` writes it again")
    if check_files and is_local(str(folder)):
        _check_files(Path(local_path(str(folder))), manifest)
    return manifest


def manifest_problem(manifest: dict[str, Any]) -> str:
    """What is wrong with the form of a manifest, or an empty text."""
    if problem := _key_problem(manifest, MANIFEST_KEYS):
        return problem
    if not _are_counts(manifest["samples"]):
        return "samples are no numbers by task"
    names: set[str] = set()
    for number, shard in enumerate(manifest["shards"]):
        if not isinstance(shard, dict):
            return f"shards[{number}] is {_kind(shard)}"
        if problem := _key_problem(shard, SHARD_KEYS):
            return f"shards[{number}] {problem}"
        if not _are_counts(shard["rows"]):
            return f"shards[{number}].rows are no numbers by task"
        if not all(isinstance(rows, dict) and _are_counts(rows) for rows in shard["tags"].values()):
            return f"shards[{number}].tags are no numbers by task and tags"
        if problem := _name_problem(shard):
            return f"shards[{number}].{problem}"
        if shard["name"] in names:
            return f"lists {shard['name']} twice"
        names.add(shard["name"])
    return "" if names else "lists no shard"


def _name_problem(shard: dict[str, Any]) -> str:
    """What is wrong with the name and the hashes of a shard; local copies are named by the hashes."""
    if not is_file_name(shard["name"]) or not shard["name"].endswith(".tar"):
        return f"name {shard['name']!r} is no name of a tar in the folder"
    if not isinstance(tar := shard.get("tar", shard["name"]), str) or not tar.endswith(".tar"):
        return f"tar {tar!r} is no path of a tar"
    for key in ("sha256", "index_sha256"):
        if not re.fullmatch(r"[0-9a-f]{64}", shard[key]):
            return f"{key} {shard[key]!r} is no SHA-256"
    return ""


def _key_problem(values: dict[str, Any], kinds: Mapping[str, type]) -> str:
    """The first key that is missing or has a value of another type."""
    for key, kind in kinds.items():
        if key not in values:
            return f"has no {key}"
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            return f"has {_kind(values[key])} as {key}"
    return ""


def _are_counts(values: dict[str, Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values.values())


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    names, shards = set(os.listdir(folder)), manifest["shards"]
    for shard in shards:
        for name in (index_name(shard["name"]), *([] if "tar" in shard else [shard["name"]])):
            if name not in names:
                raise UserError(
                    f"{folder / name}: missing, but {folder / MANIFEST} lists it; bring it back or index again"
                )
    for shard in shards[:: -(-len(shards) // SIZES_CHECKED) or 1]:
        tar = shard_url(folder, shard)
        if not is_local(tar):
            continue
        try:
            size = os.stat(tar).st_size
        except OSError:
            raise UserError(f"{tar}: missing, but the selection {folder} takes rows of it; select again") from None
        if size != shard["bytes"]:
            raise UserError(f"{tar}: has {size} bytes, the manifest says {shard['bytes']}; copy it again")


def _groups_of(file: pq.ParquetFile, task: str) -> list[int]:
    """Row groups with rows of a task."""
    number = file.schema_arrow.names.index("task")
    statistics = [file.metadata.row_group(i).column(number).statistics for i in range(file.num_row_groups)]
    return [i for i, s in enumerate(statistics) if s is not None and s.min == task]
