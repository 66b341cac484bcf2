"""Writes the shards of one part of a source. A second run goes on after the last shard that is complete.

Beside shard-PPPPP-SSSS.tar (part, number) are shard-PPPPP-SSSS.source.parquet, with what the source says about each
record, and in the folder .import a file that says how far the part was read and what was rejected. That file is written
last.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    Reject,
    is_text_only,
    shard_members,
)
from data_pipelines.prepare.operator import METADATA_KEY
from data_pipelines.shards.write import tar_writer
from emma_train.storage.files import replacing, write_atomic

PROGRESS_FOLDER = ".import"
SOURCE_COLUMNS = "source"
"""Name of the column files, as those of an operator are named after it."""


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is closed."""

    samples: int = 10_000
    bytes: int = 256 << 20


@dataclass(frozen=True)
class ImportCounts:
    """What became of the items of a source: items = records + rejected."""

    items: int = 0
    records: int = 0
    rejected: int = 0
    text_only: int = 0
    """Records without an image: i2t trains on them, as text alone."""
    broken_files: int = 0
    """Files that break off, whose further items nobody can count."""
    shards: int = 0

    def __add__(self, other: "ImportCounts") -> "ImportCounts":
        sums = (getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        return ImportCounts(*sums)


@dataclass
class ShardProgress:
    """What one output shard took from its part, as its file in PROGRESS_FOLDER says."""

    start: int
    """Items of the part before it."""
    items: int = 0
    """Items that were read, of which each is a record or a reject."""
    records: int = 0
    text_only: int = 0
    """Records without an image."""
    is_last: bool = False
    rejects: list[list[Any]] = field(default_factory=list)
    """[name of the item, reason, count]."""

    @property
    def counts(self) -> ImportCounts:
        numbers = [count for _, _, count in self.rejects]
        is_shard = int(self.records > 0)
        return ImportCounts(self.items, self.records, sum(numbers), self.text_only, numbers.count(0), is_shard)


def part_progress(out: Path, part: int) -> list[ShardProgress]:
    """What was done of a part, shard by shard."""
    done: list[ShardProgress] = []
    while (path := _progress_path(out, part, len(done))).exists():
        done.append(ShardProgress(**json.loads(path.read_text(encoding="utf-8"))))
    return done


def write_part(out: Path, number: int, part: ImportPart, options: ImportOptions, limits: ShardLimits) -> ImportCounts:
    """Write the shards of a part that are missing; returns what all of them took. Raises OSError and UserError."""
    done = part_progress(out, number)
    while not (done and done[-1].is_last):
        start = done[-1].start + done[-1].items if done else 0
        done += _write_shards(out, number, len(done), part, options, limits, start)
    return sum((shard.counts for shard in done), ImportCounts())


def _write_shards(
    out: Path, number: int, first: int, part: ImportPart, options: ImportOptions, limits: ShardLimits, start: int
) -> list[ShardProgress]:
    """Write the shards from item `start` to the end of the part."""
    done: list[ShardProgress] = []
    writer = _PartShard(out, number, first, start, options)
    for outcome in part.read(start):
        if writer.is_full(limits):
            done.append(writer.close(is_last=False))
            following = writer.progress.start + writer.progress.items
            writer = _PartShard(out, number, first + len(done), following, options)
        writer.add(outcome)
    return [*done, writer.close(is_last=True)]


class _PartShard:
    """One output shard while it is written; the tar file appears with its first record."""

    def __init__(self, out: Path, part: int, number: int, start: int, options: ImportOptions) -> None:
        self.out, self.part, self.number, self.options = out, part, number, options
        self.progress = ShardProgress(start)
        self._bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._tar = out / f"shard-{part:05d}-{number:04d}.tar"
        self._unfinished = self._tar.with_name(self._tar.name + ".new")
        self._file: Any = None
        self._writer: Any = None

    def is_full(self, limits: ShardLimits) -> bool:
        return self.progress.records >= limits.samples or self._bytes >= limits.bytes

    def add(self, outcome: ImportedSample | Reject) -> None:
        """Write a sample, or note why there is none."""
        if isinstance(outcome, ImportedSample):
            try:
                members = shard_members(outcome, self.options)
            except ValueError as error:
                outcome = Reject(outcome.source_id, str(error))
        if isinstance(outcome, Reject):
            name = outcome.source_id.encode("utf-8", "backslashreplace").decode()
            reason = outcome.reason.encode("utf-8", "backslashreplace").decode()
            self.progress.rejects.append([name, reason, outcome.count])
            self.progress.items += outcome.count
            return
        if self._writer is None:
            self._file = open(self._unfinished, "wb")  # noqa: SIM115
            self._writer = tar_writer(self._file)
        key = f"{key_prefix(self.options.dataset)}-{self.part:05d}-{self.progress.start + self.progress.items:08d}"
        self._bytes += self._writer.write({"__key__": key, **members})
        self._rows.append({"key": key, **{_column_name(name): value for name, value in outcome.columns.items()}})
        self.progress.items += 1
        self.progress.records += 1
        self.progress.text_only += is_text_only(list(members))

    def close(self, is_last: bool) -> ShardProgress:
        """Give the files their names."""
        self.progress.is_last = is_last
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            with replacing(self._tar.with_suffix(f".{SOURCE_COLUMNS}.parquet")) as columns:
                pq.write_table(columns_table(self._rows), columns, compression="zstd")
            self._unfinished.rename(self._tar)
        text = json.dumps(asdict(self.progress), ensure_ascii=False)
        write_atomic(_progress_path(self.out, self.part, self.number), text + "\n")
        return self.progress


def columns_table(rows: list[dict[str, Any]]) -> pa.Table:
    """What the source says about records as a table with the metadata of an operator's columns: whole numbers, numbers,
    truth values, texts, and lists of whole numbers; what fits none of these in all rows is a text of JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_column([row.get(name) for row in rows]) for name in names]
    identity = {"operator": SOURCE_COLUMNS, "version": 1, "settings": {}}
    return pa.table(arrays, names).replace_schema_metadata({METADATA_KEY: json.dumps(identity, sort_keys=True)})


def _column_name(name: str) -> str:
    """A name of the source as that of a column: `key` is the record's, and what is no UTF-8 is escaped."""
    return "source_key" if name == "key" else name.encode("utf-8", "backslashreplace").decode()


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_() if kinds else pa.null())
    fits = all(abs(value) < 2**63 for value in values if type(value) is int)
    if kinds <= {int} and fits:
        return pa.array(values, pa.int64())
    if kinds <= {int, float} and fits:
        return pa.array([None if value is None else float(value) for value in values], pa.float64(), from_pandas=True)
    if kinds == {list} and all(type(v) is int for value in values for v in value or [] if v is not None):
        return pa.array(values, pa.list_(pa.int64()))
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array([v and v.encode("utf-8", "backslashreplace").decode() for v in texts], pa.string())


def _progress_path(out: Path, part: int, number: int) -> Path:
    return out / PROGRESS_FOLDER / f"{part:05d}-{number:04d}.json"


def key_prefix(name: str) -> str:
    """A name as the start of keys: letters, digits and -, with a hash where others were lost."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in name.lower()).strip("-")
    return kept if kept and kept == name.lower() else f"{kept or 'set'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
