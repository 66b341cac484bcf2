"""Writes the records of a selection as shards of their own, where one wants to move them."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from data_pipelines.prepare.jobs import JobOptions, RecordCounts, ShardTask, run_job, writing
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.images import image_members
from data_pipelines.shards.index import CAPTIONS, index_path, read_manifest, shard_url
from data_pipelines.shards.record import CAPTION_QUESTION, caption_alternative, read_record
from data_pipelines.shards.record_map import read_map
from data_pipelines.shards.tar import TAR_BLOCK, crc32, read_group
from data_pipelines.shards.write import compact_json
from emma_train.errors import RunError, UserError
from emma_train.sequence.tasks import RECORD_KEYS, TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import make_folder
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import parent_url

log = logging.getLogger(__name__)
END_OF_TAR = bytes(2 * TAR_BLOCK)
CACHE = ".materialize"
"""Folder of the markers of finished shards."""


def materialize(selection: Path, out: Path, tokenizer: Path, options: JobOptions) -> dict[str, Any]:
    """Write the shards of a selection to `out`, one for each of its shards, and index them; returns the manifest.

    A record's bytes are copied as they are, unless the selection has other tags than its JSON, or only some of the
    tasks that its JSON lists; then that is rewritten. Records that are read through a map are written in the record
    format. Raises UserError and RunError.
    """
    manifest = read_manifest(selection)
    if TextTokenizer(tokenizer).sha256 != manifest["tokenizer_sha256"]:
        raise UserError(f"--tokenizer {tokenizer}: is not the one of the selection {selection}")
    make_folder(out / CACHE)
    tasks = [
        ShardTask(
            entry["name"],
            out / CACHE / f"{entry['name']}.json",
            (out / entry["name"],),
            {"shard_sha256": entry["sha256"], "index_sha256": entry["index_sha256"]},
            (str(shard_url(selection, entry)), selection / entry["name"]),
        )
        for entry in manifest["shards"]
    ]
    run_job("materialize", tasks, materialize_shard, options)
    provenance = {**manifest["provenance"], "materialized": True}
    return index_folder(out, tokenizer, provenance, options.workers)


def materialize_shard(task: ShardTask, url: str, selected: Path) -> RecordCounts:
    """Write the tar of one shard. The function of a job. Raises RunError where bytes differ from the index."""
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, list[str]] = {}
    for row in pq.read_table(index_path(selected)).to_pylist():
        rows[row["key"]] = row
        tasks.setdefault(row["key"], []).append(row["task"])
    storage, record_map = ShardReader(), read_map(parent_url(url))
    with writing(task.outputs[0]) as path, open(path, "wb") as tar:
        for key, row in sorted(rows.items(), key=lambda item: item[1]["offset"]):
            try:
                data = storage.read_range(url, row["offset"], row["size"])
            except StorageError as error:
                raise RunError(str(error)) from None
            if crc32(data) != row["crc32"]:
                raise RunError(f"{url}: record {key} differs from the selection's crc32; select again")
            members = {name: bytes(content) for name, content in read_group(data).items()}
            if record_map is not None:
                members, data = record_map.converted(members), b""
            _write_record(tar, key, members, data, tasks[key], row["tags"], row.get(CAPTIONS) or [])
        tar.write(END_OF_TAR)
    return RecordCounts(len(rows), len(rows))


def _write_record(
    tar: BinaryIO, key: str, members: dict[str, bytes], data: bytes, tasks: list[str], tags: list[str],
    captions: list[str],
) -> None:  # fmt: skip
    """Write a record with these tasks, tags and further captions. `data` are its bytes in a tar, which are copied if
    nothing changes; empty if there are none."""
    fields = json.loads(members["json"]) if "json" in members else {}
    named = [task for task in RECORD_KEYS if task in fields]
    dropped = [task for task in named if fields[task] and task not in tasks]
    if data and not dropped and not captions and sorted(set(read_record(members).get("tags", []))) == list(tags):
        tar.write(data)
        return
    fields = {name: value for name, value in fields.items() if name not in dropped} | {"tags": list(tags)}
    for number, caption in enumerate(captions):
        if not named:
            members[f"zz-{number}.txt"] = caption.encode()  # captions are numbered in the order of their names
        for task in set(named) & {"i2t", "t2i"} - set(dropped):
            image = next(iter(image_members(members)))
            fields[task] = [*fields[task], caption_alternative(TASKS[task], image, caption, CAPTION_QUESTION)]
    for name, content in (members | {"json": compact_json(fields)}).items():
        tar.writelines(_member(f"{key}.{name}", content))


def _member(name: str, content: bytes) -> Iterator[bytes]:
    """A file of a tar, with fixed time and owner."""
    import tarfile

    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(content), 0o444, "emma", "emma"
    yield info.tobuf(tarfile.PAX_FORMAT)
    yield content
    yield bytes(-len(content) % TAR_BLOCK)


def licences(provenance: Mapping[str, Any]) -> list[str]:
    """All licences that a provenance names, those of a selection's sources too."""
    names = []
    for key, value in provenance.items():
        if key in ("licence", "license") and isinstance(value, str):
            names.append(value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                names += licences(inner)
    return list(dict.fromkeys(names))
