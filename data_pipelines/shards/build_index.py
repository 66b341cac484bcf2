"""Makes the indexes and the manifest of a folder of shards: reads each tar once, in parallel; can be resumed."""

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.shards.excluded import refuse_members, refuse_names, refuse_provenance
from data_pipelines.shards.images import display_size, image_name, image_parts, open_image
from data_pipelines.shards.index import INDEX_SCHEMA, MANIFEST, SCHEMA_VERSION, index_path
from data_pipelines.shards.record import layouts, missing_part, read_record, tags_of
from data_pipelines.shards.record_map import RecordMap, map_of, read_map, write_map
from data_pipelines.shards.tar import TAR_BLOCK, BrokenTar, Group, Readable, groups
from emma_train.errors import UserError
from emma_train.sequence import layout
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import make_folder, replacing, write_atomic

log = logging.getLogger(__name__)
ROWS_AT_ONCE = 1024
ENTRY_KEY = b"emma_shard"
"""Metadata key of the index under which it stores the shard's manifest entry, so that a second run need not read the
tar."""


@dataclass
class IndexedShard:
    """A shard that has an index."""

    entry: dict[str, Any]
    """The shard's entry in the manifest."""
    hashes: np.ndarray = field(repr=False)
    """uint64: hashes of all keys, each once, in ascending order."""


def index_folder(
    folder: Path,
    tokenizer: Path | str,
    provenance: dict[str, Any] | None = None,
    workers: int = 1,
    force: bool = False,
    record_map: RecordMap | None = None,
) -> dict[str, Any]:
    """Write the index of every tar of a folder and its manifest; returns the manifest.

    An existing index of the same tar and tokenizer is kept, unless `force`. Records that cannot be used are left out,
    counted and logged. `provenance` None keeps that of the previous manifest, `record_map` None the folder's map.
    Raises UserError on a broken tar and on a key that occurs twice, after all other shards are done, and on data of the
    excluded set (excluded.py).
    """
    folder, text = Path(folder), TextTokenizer(tokenizer)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: holds no *.tar to index")
    provenance = _provenance(folder) if provenance is None else provenance
    refuse_names([folder.absolute().as_posix()], folder)
    refuse_provenance(provenance, folder)
    make_folder(folder)
    if record_map is not None:
        write_map(folder, record_map)
    record_map = read_map(folder)
    _remove_damaged(folder)
    unfinished = {"schema": SCHEMA_VERSION, "unfinished": True, "provenance": provenance}
    write_atomic(folder / MANIFEST, json.dumps(unfinished, indent=1) + "\n")
    shards, problems = _index_all(tars, text.path, force, workers)
    problems += _duplicate_keys(folder, shards)
    if problems:
        more = f" (and {len(problems) - 1} more problems: {'; '.join(problems[1:5])})" if problems[1:] else ""
        raise UserError(problems[0] + more)
    entries = [shard.entry for shard in shards]
    samples = {task: sum(entry["rows"][task] for entry in entries) for task in RECORD_KEYS}
    left_out = [entry for entry in entries if entry["left_out"]]
    if not any(samples.values()):
        first = left_out[0]["left_out_first"] if left_out else "the tars are empty"
        raise UserError(f"{folder}: no record can be indexed; {first}")
    for entry in left_out[:10]:
        log.warning("%s: %d records left out; %s", entry["name"], entry["left_out"], entry["left_out_first"])
    manifest = {
        "schema": SCHEMA_VERSION,
        "tokenizer_sha256": text.sha256,
        "samples": samples,
        "shards": entries,
        "provenance": provenance,
        **({"map": asdict(record_map)} if record_map is not None else {}),
    }
    log.info(
        "%s: indexed %s of %d shards; %d records left out",
        *(folder, ", ".join(f"{num} {task}" for task, num in samples.items())),
        *(len(entries), sum(entry["left_out"] for entry in entries)),
    )
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def index_shard(tar: Path, tokenizer: Path, force: bool = False) -> IndexedShard:
    """Index one tar, or keep its index if that is valid. Raises UserError."""
    text = _tokenizer(tokenizer)
    entry = None if force else _valid_entry(tar, text.sha256)
    if entry is None:
        entry = _write_index(tar, text)
    index = index_path(tar)
    keys = pq.read_table(index, columns=["key"])["key"].to_numpy()
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    hashes = np.unique(np.frombuffer(b"".join(digests), np.uint64))
    return IndexedShard({**entry, "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()}, hashes)


def _index_all(tars: list[Path], tokenizer: Path, force: bool, workers: int) -> tuple[list[IndexedShard], list[str]]:
    """The indexed shards, and the error messages of the others, both in the order of the tars."""
    done: dict[Path, IndexedShard | str] = {}
    last_logged = time.monotonic()
    for tar, result in _results(tars, tokenizer, force, min(workers, len(tars))):
        done[tar] = result
        if time.monotonic() > last_logged + 10:
            last_logged = time.monotonic()
            log.info("%s: %d of %d shards indexed", tar.parent, len(done), len(tars))
    results = [done[tar] for tar in tars]
    return [r for r in results if isinstance(r, IndexedShard)], [r for r in results if isinstance(r, str)]


def _results(tars: list[Path], tokenizer: Path, force: bool, workers: int) -> Iterator[tuple[Path, IndexedShard | str]]:
    if workers == 1:
        yield from ((tar, _index_or_error(tar, tokenizer, force)) for tar in tars)
        return
    # Spawned: a fork would copy locks that threads of the tokenizer or of pyarrow may hold.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_index_or_error, tar, tokenizer, force): tar for tar in tars}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                f"{tars[0].parent}: an indexing process died (out of memory?); run again with fewer --workers, "
                f"it goes on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _index_or_error(tar: Path, tokenizer: Path, force: bool) -> IndexedShard | str:
    """index_shard, which returns its error message instead of raising."""
    try:
        return index_shard(tar, tokenizer, force)
    except UserError as error:
        return str(error)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path)


def _valid_entry(tar: Path, tokenizer: str) -> dict[str, Any] | None:
    """The manifest entry in the tar's index; None if the index is missing or of another tar or tokenizer.

    A tar that was modified after its index was written is hashed to compare it.
    """
    index = index_path(tar)
    try:
        metadata = pq.read_metadata(index).metadata or {}
        entry: dict[str, Any] = json.loads(metadata[ENTRY_KEY])
        known = entry.pop("schema"), entry.pop("tokenizer_sha256"), entry["name"], entry["bytes"]
        stored_map = entry.pop("map", None)
        if known != (SCHEMA_VERSION, tokenizer, tar.name, tar.stat().st_size):
            return None
        if (map_of(stored_map, str(index)) if stored_map else None) != read_map(tar.parent):
            return None
        if tar.stat().st_mtime_ns > index.stat().st_mtime_ns and _sha256(tar) != entry["sha256"]:
            return None
        return entry
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def _write_index(tar: Path, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Read a tar once and write its index; returns the shard's manifest entry."""
    tables: dict[str, list[pa.Table]] = {task: [] for task in RECORD_KEYS}
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in RECORD_KEYS}
    tags: dict[str, Counter[str]] = {task: Counter() for task in RECORD_KEYS}
    keys: set[str] = set()
    left_out, first, record_map = 0, "", read_map(tar.parent)
    try:
        _check_end(tar)
        with open(tar, "rb") as raw:
            file = HashedFile(raw)
            for group in groups(file):
                if group.key in keys:
                    raise UserError(f"{tar}: key {group.key} occurs twice; keys are unique in a folder")
                keys.add(group.key)
                refuse_members(group.key, group.members, tar)
                try:
                    new_rows = list(_record_rows(group, tokenizer, record_map))
                except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
                    left_out, first = left_out + 1, first or f"record {group.key}: {type(error).__name__}: {error}"
                    continue
                for row in new_rows:
                    task = row["task"]
                    tags[task]["|".join(row["tags"])] += 1
                    rows[task].append(row)
                    if len(rows[task]) >= ROWS_AT_ONCE:
                        tables[task].append(pa.Table.from_pylist(rows[task], INDEX_SCHEMA))
                        rows[task] = []
            size, sha256 = file.finish()
    except BrokenTar as error:
        raise UserError(f"{tar}: broken tar, it {error}; write it again") from None
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror})") from None
    for task, rest in rows.items():
        tables[task].append(pa.Table.from_pylist(rest, INDEX_SCHEMA))
    joined = {task: pa.concat_tables(parts) for task, parts in tables.items()}
    entry = {
        "name": tar.name,
        "bytes": size,
        "sha256": sha256,
        "rows": {task: len(table) for task, table in joined.items()},
        "tags": {task: dict(sorted(counts.items())) for task, counts in tags.items()},
        "left_out": left_out,
        **({"left_out_first": first} if left_out else {}),
    }
    stamp = {"schema": SCHEMA_VERSION, "tokenizer_sha256": tokenizer.sha256, **entry}
    stamp |= {"map": asdict(record_map)} if record_map is not None else {}
    schema = INDEX_SCHEMA.with_metadata({ENTRY_KEY: json.dumps(stamp)})
    with replacing(index_path(tar)) as index, pq.ParquetWriter(index, schema, compression="zstd") as writer:
        for table in joined.values():
            if len(table):
                writer.write_table(table, row_group_size=1 << 16)
    return entry


def _check_end(tar: Path) -> None:
    """Raise BrokenTar where a tar has no byte, and log where it lacks the zeros that end one."""
    with open(tar, "rb") as file:
        if (size := file.seek(0, os.SEEK_END)) == 0:
            raise BrokenTar("is empty")
        file.seek(size - min(TAR_BLOCK, size))
        if file.read().strip(b"\0"):
            log.warning("%s: does not end with zeros, as a tar does; was it cut off?", tar)


def _record_rows(group: Group, tokenizer: TextTokenizer, record_map: RecordMap | None) -> Iterator[dict[str, Any]]:
    """The index rows of one record, one per task. Foreign data can raise many kinds of errors here."""
    "/".join(
        (group.key, *group.members)
    ).encode()  # raises an error if a name is not UTF-8, which the index could not store
    if group.repeated:
        raise ValueError(f"it has two members {group.repeated[0]}")
    record = read_record(group.members, record_map=record_map)
    tasks = [task for task in RECORD_KEYS if record.get(task)]
    if not tasks:
        raise ValueError(_no_task(group))
    parts = image_parts(group.members)
    sizes = [display_size(open_image(group.members[part])) for part in parts]
    numbers = {image_name(part): i for i, part in enumerate(parts)}
    if len(numbers) < len(parts):
        raise ValueError(f"two of its images have one name: {', '.join(parts)}")
    for task in tasks:
        alternatives = record[task]
        if missing := next(filter(None, (missing_part(a, task) for a in alternatives)), None):
            raise ValueError(f"an alternative of its {task} has {missing}")
        counts = [layout.num_text_tokens(segments) for segments in layouts(record, task, tokenizer)]
        yield {
            "key": group.key,
            "task": task,
            "offset": group.offset,
            "size": group.size,
            "crc32": group.crc32,
            "text_tokens": [text for text, _ in counts],
            "supervised_tokens": [supervised for _, supervised in counts],
            "context": [[numbers[name] for name in a.get("images", [])] for a in alternatives],
            "target": [numbers[a["target"]] if "target" in a else -1 for a in alternatives],
            "widths": [width for width, _ in sizes],
            "heights": [height for _, height in sizes],
            "tags": tags_of(record),
        }


def _no_task(group: Group) -> str:
    """Why a record has no task: its members and keys, and the options that say what they are."""
    try:
        keys = list(json.loads(group.members.get("json", b"{}")))
    except (ValueError, TypeError):
        keys = []
    return (
        f"it has no task: no alternatives of {', '.join(RECORD_KEYS)}, and is no image with a caption; its members: "
        f"{', '.join(group.members)}; keys of its JSON: {', '.join(map(str, keys)) or 'none'}; "
        "--caption, --turns, or --source, --target and --instruction say where its texts and images are"
    )


class HashedFile:
    """A file that counts and hashes the bytes that are read from it."""

    def __init__(self, file: Readable) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        self.size += len(data)
        self.sha256.update(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Size and sha256 of the whole file; reads what is left of it."""
        while self.read(1 << 20):
            pass
        return self.size, self.sha256.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _duplicate_keys(folder: Path, shards: list[IndexedShard]) -> list[str]:
    """An error for each key that two shards have. Compares hashes first: a billion keys do not fit in memory."""
    if not shards:
        return []
    hashes = np.concatenate([shard.hashes for shard in shards])
    shard_of = np.repeat(np.arange(len(shards)), [len(shard.hashes) for shard in shards])
    order = np.argsort(hashes, kind="stable")
    hashes, shard_of = hashes[order], shard_of[order]
    problems = []
    for index in np.flatnonzero(hashes[1:] == hashes[:-1])[:100]:
        one, other = (shards[shard_of[index + i]].entry["name"] for i in (0, 1))
        for key in sorted(_keys(folder / one) & _keys(folder / other)):
            problems.append(f"{folder / other}: key {key} occurs twice, in {one} too; keys are unique in a folder")
    return list(dict.fromkeys(problems))


def _keys(tar: Path) -> set[str]:
    return set(pq.read_table(index_path(tar), columns=["key"])["key"].to_pylist())


def _remove_damaged(folder: Path) -> None:
    """Remove the indexes that differ from their hash in the folder's manifest: they are written again. Those that an
    interrupted run wrote are in no manifest yet, and are kept."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["shards"]
        hashes = {index_path(folder / shard["name"]): shard["index_sha256"] for shard in listed}
    except (OSError, ValueError, TypeError, LookupError):
        return
    for index, expected in hashes.items():
        if index.parent == folder and index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest() != expected:
            log.warning("%s: differs from its sha256 in %s; it is written again", index, MANIFEST)
            index.unlink()


def _provenance(folder: Path) -> dict[str, Any]:
    """The provenance in the folder's manifest; empty if there is no manifest yet."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("provenance", {}))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not readable ({error}); remove it and index again") from error
