"""Annotates shards: writes shard-000000.OPERATOR.parquet beside each, and what was rejected and why beside that."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.prepare.jobs import RecordCounts, ShardTask, writing
from data_pipelines.prepare.operator import (
    READ_ERRORS,
    Annotate,
    Columns,
    Operator,
    Rejected,
    load_operator,
    reason_of,
)
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.shards.index import index_path, read_manifest, shard_url
from data_pipelines.shards.record_map import read_map
from emma_train.errors import UserError

ROWS_PER_GROUP = 1 << 16


@dataclass(frozen=True)
class OperatorChoice:
    """An operator as the command line names it, small enough to be sent to workers."""

    name: str
    function: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Operator:
        """Raises UserError."""
        return load_operator(self.name, self.function).with_settings(
            {key: list(value) if isinstance(value, tuple) else value for key, value in self.settings}
        )


def column_file(tar: Path, operator: str) -> Path:
    """The column file of a shard."""
    return tar.with_name(f"{tar.stem}.{operator}.parquet")


def located_column_file(tar: Path, records_tar: str, operator: str) -> Path | None:
    """The column file of a shard; of a selection's, that beside the shard from which its rows are if it has none."""
    paths = column_file(tar, operator), column_file(Path(records_tar), operator)
    return next((path for path in paths if path.exists()), None)


def reject_file(tar: Path, operator: str) -> Path:
    """Records that an operator rejected, one JSON object a line: key, reason. Absent where it rejected none."""
    return tar.with_name(f"{tar.stem}.{operator}.rejected.jsonl")


def done_file(tar: Path, operator: str) -> Path:
    """The marker of a finished shard."""
    return tar.with_name(f"{tar.stem}.{operator}.done.json")


def annotate_tasks(folders: Sequence[Path], choice: OperatorChoice) -> list[ShardTask]:
    """One task for each shard of some folders; of a selection, for its rows alone.

    Raises UserError where an operator that this one reads has not run.
    """
    operator, tasks = choice.load(), []
    files = {name: content_hash(operator.settings[name]) for name in sorted(operator.files)}
    for folder in folders:
        for entry in read_manifest(folder)["shards"]:
            tar = folder / entry["name"]
            fingerprint = {
                **operator.identity,
                "files": files,
                "shard_sha256": entry["sha256"],
                "index_sha256": entry["index_sha256"],
                "reads": _hashes_of_columns(tar, shard_url(folder, entry), operator),
            }
            outputs = column_file(tar, operator.name), reject_file(tar, operator.name)
            rows, arguments = sum(entry["rows"].values()), (tar, shard_url(folder, entry), choice)
            marker = done_file(tar, operator.name)
            tasks.append(ShardTask(str(tar), marker, outputs, fingerprint, arguments, rows))
    return tasks


def annotate_shard(task: ShardTask, tar: Path, records_tar: str, choice: OperatorChoice) -> RecordCounts:
    """Write the columns and rejects of one shard. The function of a job (`jobs.ShardWork`).

    `tar` names index and columns; the records are in `records_tar`, which is another file for a selection.
    """
    operator, annotate = _started(choice)
    num_read, rejects = 0, []
    located = {n: located_column_file(tar, records_tar, n) for n in (*operator.reads, *operator.optional_reads)}
    reads = {name: path for name, path in located.items() if path is not None}
    columns, rejected_file = task.outputs
    with (
        open(records_tar, "rb") as shard,
        writing(columns) as path,
        pq.ParquetWriter(path, operator.schema, compression="zstd") as writer,
    ):
        pending: list[pa.Table] = []
        for batch in _batches(stored_records(tar, shard, reads), operator.batch_size):
            table, rejected = annotate_batch(operator, annotate, batch)
            num_read += len(batch)
            rejects += rejected
            pending.append(table)
            if sum(map(len, pending)) >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(pending))
                pending = []
        if pending:
            writer.write_table(pa.concat_tables(pending))
    if rejects:
        with writing(rejected_file) as path:
            lines = (json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in rejects)
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    else:
        rejected_file.unlink(missing_ok=True)
    return RecordCounts(num_read, num_read - len(rejects), len(rejects))


def annotate_batch(
    operator: Operator, annotate: Annotate, records: Sequence[StoredRecord]
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Columns of the records that are kept, and (key, reason) of those rejected. Raises UserError on wrong columns."""
    unread = {record.key: name for record in records for name in operator.reads if name not in record.columns}
    wanted = [record for record in records if record.key not in unread]
    columns, reasons = _results(operator, annotate, wanted)
    reasons |= {key: f"the operator {name} rejected it" for key, name in unread.items()}
    kept = [number for number, record in enumerate(wanted) if record.key not in reasons]
    arrays = [pa.array([wanted[number].key for number in kept], pa.string())]
    for name, type_ in operator.columns.items():
        try:
            arrays.append(pa.array([columns[name][number] for number in kept], type_))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise UserError(f"operator {operator.name}: column {name} is not of type {type_}: {error}") from None
    return pa.Table.from_arrays(arrays, schema=operator.schema), [
        (record.key, reasons[record.key]) for record in records if record.key in reasons
    ]


def _results(operator: Operator, annotate: Annotate, records: Sequence[StoredRecord]) -> tuple[Columns, dict[str, str]]:
    """The columns of a batch, and the reasons by key of the records rejected. A batch that fails is tried record by
    record."""
    if not records:
        return {name: [] for name in operator.columns}, {}
    try:
        columns = annotate(records)
    except READ_ERRORS as error:
        if len(records) == 1:
            return {name: [None] for name in operator.columns}, {records[0].key: reason_of(error)}
        singles = [_results(operator, annotate, [record]) for record in records]
        joined = {name: [columns[name][0] for columns, _ in singles] for name in operator.columns}
        return joined, {key: reason for _, reasons in singles for key, reason in reasons.items()}
    reasons = {
        record.key: value.reason
        for values in columns.values()
        for record, value in zip(records, values, strict=False)
        if isinstance(value, Rejected)
    }
    if len(reasons) == len(records):
        return {name: [None] * len(records) for name in operator.columns}, reasons
    lengths = {name: len(values) for name, values in columns.items()}
    if lengths != {name: len(records) for name in operator.columns}:
        raise UserError(
            f"operator {operator.name}: returned {lengths} values by column for {len(records)} records; "
            f"its columns are {', '.join(operator.columns)}"
        )
    return columns, reasons


def stored_records(tar: Path, shard: BinaryIO, reads: Mapping[str, Path]) -> Iterator[StoredRecord]:
    """The records of a shard that its index has, in the order of the tar, each with its values in the column files
    `reads` (operator -> file)."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for batch in pq.ParquetFile(index_path(tar)).iter_batches():
        for row in batch.to_pylist():
            rows.setdefault(row["key"], {})[row["task"]] = row
    columns = {name: _rows_by_key(path) for name, path in reads.items()}
    record_map = read_map(Path(shard.name).parent)
    for key in sorted(rows, key=lambda key: next(iter(rows[key].values()))["offset"]):
        of_key = {name: by_key[key] for name, by_key in columns.items() if key in by_key}
        yield StoredRecord(key, rows[key], shard, of_key, record_map)


def _batches(records: Iterator[StoredRecord], size: int) -> Iterator[list[StoredRecord]]:
    while batch := list(islice(records, size)):
        yield batch


def _rows_by_key(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(path).to_pylist()}


def _hashes_of_columns(tar: Path, records_tar: str, operator: Operator) -> dict[str, str]:
    """Hash of each column file that an operator reads. Raises UserError where one is missing."""
    hashes = {}
    for name in (*operator.reads, *operator.optional_reads):
        path = located_column_file(tar, records_tar, name)
        if path is not None:
            hashes[name] = content_hash(str(path))
        elif name in operator.reads:
            raise UserError(f"{tar}: has no columns of {name}; run `emma-data annotate {name} {tar.parent}` first")
    return hashes


def content_hash(paths: str | Sequence[str]) -> str:
    """Hash of the content of files, and of all files of folders; of large ones, of their sizes and first MiB. Raises
    UserError where one is missing."""
    hashed = hashlib.sha256()
    for path in map(Path, filter(None, [paths] if isinstance(paths, str) else paths)):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                with open(file, "rb") as opened:
                    hashed.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
                    hashed.update(opened.read(1 << 20))
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return hashed.hexdigest()[:16]


@lru_cache(maxsize=1)
def _started(choice: OperatorChoice) -> tuple[Operator, Annotate]:
    """An operator with its model, which a process loads once for all of its shards."""
    operator = choice.load()
    return operator, operator.start(operator.settings)
