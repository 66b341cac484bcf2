"""`duplicates`: which records have nearly the same image as another, by the column `hash` of the operator phash.

Unlike other operators it needs all shards at once. Equal hashes are grouped first; two different ones are compared only
if they are equal in one of `max_bits` + 1 bands, which any two are that differ in at most `max_bits` bits. Records that
are linked, directly or through others, are a cluster, and the one with the smallest key stands for it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.prepare.annotate import OperatorChoice, annotate_tasks, column_file
from data_pipelines.prepare.jobs import JobOptions, JobResult, RecordCounts, ShardTask, run_job, unfinished, writing
from data_pipelines.prepare.operator import Operator
from data_pipelines.prepare.operators.decontaminate import band_masks
from data_pipelines.prepare.select_rows import EngineLimits, connect_duckdb
from emma_train.errors import UserError

DUPLICATES = Operator(
    "duplicates",
    1,
    {"duplicate_of": pa.string(), "cluster_size": pa.int32()},
    lambda settings: lambda records: {},
    {"max_bits": 3},
    reads=("phash",),
)
"""duplicate_of: key of the record that stands for the cluster; null for that record itself and for unique ones."""


def duplicate_tasks(folders: Sequence[Path], max_bits: int) -> list[ShardTask]:
    """One task for each shard; each depends on the hashes of all. Raises UserError where phash has not run."""
    operator = DUPLICATES.with_settings({"max_bits": max_bits})
    hashes = annotate_tasks(folders, OperatorChoice("phash"))
    if rest := unfinished(hashes)[0]:
        raise UserError(f"{rest[0].name}: has no columns of phash; run `emma-data annotate phash` on all folders first")
    others = [task.fingerprint for task in hashes]
    tasks = []
    for task in hashes:
        tar: Path = task.arguments[0]
        outputs = column_file(tar, operator.name), tar.with_name(f"{tar.stem}.{operator.name}.rejected.jsonl")
        marker = tar.with_name(f"{tar.stem}.{operator.name}.done.json")
        fingerprint = {**operator.identity, "hashes": _digest(others)}
        tasks.append(ShardTask(task.name, marker, outputs, fingerprint, (tar,), task.num_rows))
    return tasks


def find_duplicates(folders: Sequence[Path], max_bits: int, limits: EngineLimits, workers: int = 1) -> JobResult:
    """Write the columns of all shards; all or none of them are computed again. Raises UserError."""
    if not 0 <= max_bits <= 15:
        raise UserError(f"--set max_bits={max_bits}: must be from 0 to 15, of 64 bits")
    tasks = duplicate_tasks(folders, max_bits)
    clusters: dict[str, tuple[str, int]] = {}
    if unfinished(tasks)[0]:
        clusters = hash_clusters(_distinct_hashes(tasks, limits), max_bits, limits)

    def write(task: ShardTask, tar: Path) -> RecordCounts:
        hashes = pq.read_table(column_file(tar, "phash"), columns=["key", "hash"])
        keys = hashes["key"].to_pylist()
        of_rows = [clusters[value] for value in hashes["hash"].to_pylist()]
        first = [
            None if key == representative else representative
            for key, (representative, _) in zip(keys, of_rows, strict=True)
        ]
        sizes = [size for _, size in of_rows]
        schema = DUPLICATES.with_settings({"max_bits": max_bits}).schema
        with writing(task.outputs[0]) as path:
            pq.write_table(pa.table([keys, first, sizes], schema=schema), path, compression="zstd")
        return RecordCounts(len(keys), len(keys))

    return run_job("duplicates", tasks, write, JobOptions(1))


def hash_clusters(
    hashes: Sequence[tuple[str, str, int]], max_bits: int, limits: EngineLimits
) -> dict[str, tuple[str, int]]:
    """(smallest key, number of records) of the cluster of each hash, from (hash, smallest key, number of records)."""
    parents = {value: value for value, _, _ in hashes}
    for one, other in near_pairs([value for value, _, _ in hashes], max_bits, limits):
        low, high = sorted((_root(parents, one), _root(parents, other)))
        parents[high] = low
    clusters: dict[str, tuple[str, int]] = {}
    for value, key, number in hashes:
        known_key, known = clusters.get(_root(parents, value), (key, 0))
        clusters[_root(parents, value)] = min(known_key, key), known + number
    return {value: clusters[_root(parents, value)] for value in parents}


def near_pairs(hashes: Sequence[str], max_bits: int, limits: EngineLimits) -> Iterable[tuple[str, str]]:
    """Pairs of different hashes that differ in at most `max_bits` bits; a pair may come several times."""
    connection = connect_duckdb(None, limits)
    values = pa.array([int(value, 16) for value in hashes], pa.uint64())
    connection.register("_hashes", pa.table({"h": values}))
    for mask in band_masks(max_bits + 1):
        result = connection.execute(
            f"SELECT a.h, b.h FROM _hashes a JOIN _hashes b ON (a.h & {mask}::UBIGINT) = (b.h & {mask}::UBIGINT) "
            f"WHERE a.h < b.h AND bit_count(xor(a.h, b.h)) <= {max_bits}"
        )
        while rows := result.fetchmany(1 << 16):
            yield from ((f"{one:016x}", f"{other:016x}") for one, other in rows)


def _distinct_hashes(tasks: Sequence[ShardTask], limits: EngineLimits) -> list[tuple[str, str, int]]:
    files = ", ".join("'" + str(column_file(task.arguments[0], "phash")).replace("'", "''") + "'" for task in tasks)
    sql = f"SELECT hash, min(key), count(*) FROM read_parquet([{files}]) GROUP BY hash ORDER BY hash"
    return [(value, key, int(number)) for value, key, number in connect_duckdb(None, limits).execute(sql).fetchall()]


def _root(parents: dict[str, str], value: str) -> str:
    while parents[value] != value:
        parents[value] = parents[parents[value]]
        value = parents[value]
    return value


def _digest(fingerprints: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()[:16]
