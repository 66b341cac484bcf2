"""Verifies shards: hashes and checksums of manifest and index, and that every image decodes and record is usable."""

import hashlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.shards.build_index import HashedFile
from data_pipelines.shards.images import image_parts, open_image
from data_pipelines.shards.index import index_name, read_manifest, shard_url
from data_pipelines.shards.record import missing_part, read_record
from data_pipelines.shards.record_map import RecordMap, read_map
from data_pipelines.shards.tar import BrokenTar, Group, groups
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, join_url, parent_url


def check_folder(folder: str | Path, workers: int = 1) -> list[str]:
    """All problems of a shard folder, one line each, in the order of its shards. Raises UserError."""
    shards = read_manifest(folder)["shards"]
    if workers == 1 or len(shards) == 1:
        problems_of_shards = [check_shard(str(folder), shard) for shard in shards]
    else:
        with ProcessPoolExecutor(min(workers, len(shards)), multiprocessing.get_context("spawn")) as pool:
            problems_of_shards = list(pool.map(check_shard, [str(folder)] * len(shards), shards))
    return [problem for problems in problems_of_shards for problem in problems]


def check_shard(folder: str, shard: dict[str, Any]) -> list[str]:
    """All problems of one shard of a manifest, one line each. One record is in memory at a time."""
    tar, index = shard_url(folder, shard), join_url(folder, index_name(shard["name"]))
    storage, problems = ShardReader(), []
    try:
        data = storage.read(index)
    except StorageError as error:
        return [str(error)]
    if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
        problems.append(f"{display_url(index)}: content differs from its sha256 in the manifest")
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["key", "task", "offset", "size", "crc32"])
    except (pa.ArrowException, OSError, ValueError):
        return [*problems, f"{display_url(index)}: is no index that can be read"]
    index_rows = {row["key"]: (row["offset"], row["size"], row["crc32"]) for row in table.to_pylist()}
    record_map = read_map(parent_url(tar), storage)
    try:
        with storage.open(tar) as raw:
            file = HashedFile(raw)
            try:
                for group in groups(file):
                    if group.key in index_rows:  # the index leaves out records that cannot be used
                        problems += _check_group(display_url(tar), group, index_rows.pop(group.key), record_map)
            except BrokenTar as error:
                problems.append(f"{display_url(tar)}: broken tar, it {error}")
            if file.finish() != (shard["bytes"], shard["sha256"]):
                problems.append(f"{display_url(tar)}: content differs from its sha256 in the manifest")
    except (StorageError, OSError) as error:
        return [*problems, str(error) if isinstance(error, StorageError) else f"{display_url(tar)}: {error.strerror}"]
    return problems + [f"{display_url(tar)}: record {key} of the index is not in it" for key in index_rows]


def _check_group(
    tar: str, group: Group, index_row: tuple[int, int, int], record_map: RecordMap | None
) -> Iterator[str]:
    if (group.offset, group.size, group.crc32) != index_row:
        yield f"{tar}: record {group.key} differs from its crc32"
        return
    for part in image_parts(group.members):
        try:
            image = open_image(group.members[part])
            image.draft(
                "RGB", (image.width // 8, image.height // 8)
            )  # decode at 1/8 size: reads every byte, but is fast
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            yield f"{tar}: image {group.key}.{part} cannot be read ({error})"
    try:
        record = read_record(group.members, record_map=record_map)
        for task in RECORD_KEYS:
            for alternative in record.get(task, []):
                if missing := missing_part(alternative, task):
                    yield f"{tar}: record {group.key} has an alternative of {task} with {missing}"
    except (KeyError, ValueError, TypeError) as error:
        yield f"{tar}: record {group.key} cannot be read ({type(error).__name__}: {error})"
