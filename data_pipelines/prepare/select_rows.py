"""Selects rows of shards with DuckDB, over their indexes and the columns of operators, and writes a selection.

A selection is a folder with a manifest and, for each source shard of which rows are taken, an index with these rows.
The manifest says where the tars are; nothing is copied. Training, `check` and `stats` read it as any folder of shards.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.annotate import located_column_file
from data_pipelines.prepare.selection_index import (
    selected_index,
    with_captions,
    with_tags,
    write_selected_index,
)
from data_pipelines.prepare.selection_rules import (
    SelectionRules,
    condition,
    operators_in,
    selection_sql,
    sql_name,
)
from data_pipelines.shards.index import MANIFEST, SCHEMA_VERSION, index_path, read_manifest, shard_url
from emma_train.errors import UserError
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import make_folder, write_atomic
from emma_train.storage.urls import is_local

log = logging.getLogger(__name__)
TEMPORARY = ".duckdb"
"""Folder in which DuckDB keeps what does not fit in memory; removed afterwards."""
REMOVED_EXAMPLES = 4
"""Keys of removed rows that the manifest names for each condition."""
INDEX_SUFFIX = ".idx.parquet"


@dataclass(frozen=True)
class EngineLimits:
    """What DuckDB may use; beyond the memory it writes to disk."""

    memory_gib: float = 4.0
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True)
class SourceShard:
    """A shard that rows are taken of."""

    tar: Path
    """Names its index and columns."""
    entry: dict[str, Any]
    """Of its manifest."""
    records_tar: str
    """Path of the tar; another one than `tar` for the shard of a selection."""


@dataclass(frozen=True)
class SourceFolders:
    """Folders of shards that rows are taken of, sorted, so that their order on the command line changes nothing."""

    folders: tuple[Path, ...]
    shards: tuple[SourceShard, ...]
    tokenizer_sha256: str
    provenance: tuple[dict[str, Any], ...]
    """Of each folder."""

    @property
    def operators(self) -> list[str]:
        """Operators of which every shard has columns."""
        common: set[str] | None = None
        listed: dict[Path, dict[str, set[str]]] = {}
        for shard in self.shards:
            names: set[str] = set()
            for path in (shard.tar, Path(shard.records_tar)):
                if path.parent not in listed:
                    listed[path.parent] = _operators_by_shard(path.parent)
                names |= listed[path.parent].get(path.stem, set())
            common = names if common is None else common & names
        return sorted(common or ())


def read_sources(folders: Sequence[Path]) -> SourceFolders:
    """The shards of some folders. Raises UserError where there are none, or where tokenizers differ."""
    paths = sorted({Path(os.path.abspath(folder)) for folder in folders})
    manifests = {path: read_manifest(path) for path in paths}
    tokenizers = {manifest["tokenizer_sha256"]: path for path, manifest in manifests.items()}
    if len(tokenizers) > 1:
        raise UserError(f"{' and '.join(map(str, tokenizers.values()))}: were indexed with different tokenizers")
    shards = [
        SourceShard(path / entry["name"], entry, shard_url(path, entry))
        for path, manifest in manifests.items()
        for entry in sorted(manifest["shards"], key=lambda entry: str(entry["name"]))
    ]
    provenance = tuple(
        {"path": str(path), "provenance": manifest.get("provenance", {})} for path, manifest in manifests.items()
    )
    return SourceFolders(tuple(paths), tuple(shards), next(iter(tokenizers)), provenance)


def select_rows(
    out: Path,
    sources: SourceFolders,
    rules: SelectionRules,
    limits: EngineLimits,
    tokenizer: TextTokenizer | None = None,
) -> dict[str, Any]:
    """Write the selection `out` and return its manifest; `tokenizer` counts the tokens of captions.

    Raises UserError where an expression is wrong or nothing is selected, and where `out` holds something else.
    """
    if rules.captions and (tokenizer is None or tokenizer.sha256 != sources.tokenizer_sha256):
        raise UserError(
            "--captions: needs --tokenizer, the one that the shards were indexed with, to count their tokens"
        )
    make_folder(out)
    if any(path.suffix == ".tar" for path in out.iterdir()):
        raise UserError(f"{out}: holds shards; give a new folder for the selection")
    operators = operators_in(rules, sources.operators)
    temporary = out / TEMPORARY
    try:
        connection = connect_duckdb(temporary, limits)
        joined = joined_sql(connection, sources, operators)
        counts = _count(connection, rules, joined)
        removed = _removed(connection, rules, joined)
        picked = _picked(connection, selection_sql(rules, joined), rules)
        entries = list(_write_shards(out, sources, picked, tokenizer if rules.captions else None))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not entries:
        steps = ", ".join(f"{name}: {number:,}" for name, number in counts)
        raise UserError(f"nothing is selected; rows that are left after each rule: {steps}")
    samples = {task: sum(entry["rows"][task] for entry in entries) for task in RECORD_KEYS}
    counts.append(("selected", sum(samples.values())))
    manifest = {
        "schema": SCHEMA_VERSION,
        "tokenizer_sha256": sources.tokenizer_sha256,
        "samples": samples,
        "shards": entries,
        "provenance": {
            "selection": rules.as_values(),
            "rows_left": dict(counts),
            "removed": removed,
            "sources": list(sources.provenance),
        },
    }
    _remove_others(out, {entry["name"] for entry in entries})
    write_atomic(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def joined_sql(connection: Any, sources: SourceFolders, operators: Sequence[str]) -> str:
    """SQL for the index rows of all shards, each with the columns of some operators of its record."""
    index = _files_sql(connection, sources, "_files", [index_path(shard.tar) for shard in sources.shards])
    sql = f"(SELECT *, file_row_number AS _number FROM {index}) AS _index"
    for operator in operators:
        files = [located_column_file(shard.tar, shard.records_tar, operator) for shard in sources.shards]
        name = sql_name(operator)
        columns = _files_sql(connection, sources, f"_files_{name}", [path for path in files if path is not None])
        columns = f"SELECT * EXCLUDE (key, _shard, file_row_number), key AS _key, _shard AS _of_shard FROM {columns}"
        sql += (
            f' LEFT JOIN ({columns}) AS "{name}" ON "{name}"._key = _index.key AND "{name}"._of_shard = _index._shard'
        )
    return sql


def _files_sql(connection: Any, sources: SourceFolders, name: str, paths: Sequence[Path]) -> str:
    """SQL for the rows of one file for each shard, in their order, with _shard, the number of the shard. Several
    shards of selections may share a file."""
    names = pa.array([str(path) for path in paths])
    connection.register(name, pa.table({"filename": names, "_shard": pa.array(range(len(paths)), pa.int32())}))
    files = ", ".join(f"'{_quoted(path)}'" for path in dict.fromkeys(names.to_pylist()))
    read = f"read_parquet([{files}], filename = true, file_row_number = true, union_by_name = true)"
    return f"(SELECT _rows.* EXCLUDE (filename), _shard FROM {read} AS _rows JOIN {name} USING (filename))"


def _operators_by_shard(folder: Path) -> dict[str, set[str]]:
    """Operators that have columns in a folder, by the stem of the shard."""
    operators: dict[str, set[str]] = {}
    for name in os.listdir(folder):
        stem, dot, operator = name.removesuffix(".parquet").rpartition(".")
        if name.endswith(".parquet") and dot and operator != "idx":
            operators.setdefault(stem, set()).add(operator)
    return operators


def connect_duckdb(temporary: Path | None, limits: EngineLimits) -> Any:
    """A database in memory within limits, which writes what does not fit to the folder `temporary` (None: its default).
    Raises UserError."""
    try:
        import duckdb
    except ModuleNotFoundError:
        raise UserError("this command needs duckdb; pip install 'emma-train[data]'") from None
    connection = duckdb.connect()
    connection.execute(f"SET threads = {limits.threads}")
    connection.execute(f"SET memory_limit = '{limits.memory_gib} GiB'")
    connection.execute("SET preserve_insertion_order = false")
    if temporary is not None:
        connection.execute(f"SET temp_directory = '{_quoted(str(temporary))}'")
    return connection


def _execute(connection: Any, sql: str, rules: SelectionRules) -> Any:
    import duckdb

    try:
        return connection.execute(sql)
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"select: {_first_line(error)}; raise --memory-gib") from None
    except duckdb.Error as error:
        expressions = "; ".join(f"--{name} {text}" for name, text in rules.expressions())
        raise UserError(f"{expressions}: {_first_line(error)}") from None


def _count(connection: Any, rules: SelectionRules, joined: str) -> list[tuple[str, int]]:
    """Number of rows in all, and that are left after the tasks and after each condition."""
    names = ["rows", *(["task"] if rules.tasks else []), *rules.where]
    conditions = ["TRUE", *([condition(rules, 0)] if rules.tasks else [])]
    conditions += [condition(rules, number + 1) for number in range(len(rules.where))]
    columns = ", ".join(f"count(*) FILTER ({text})" for text in conditions)
    numbers = _execute(connection, f"SELECT {columns} FROM {joined}", rules).fetchone()
    return list(zip(names, map(int, numbers), strict=True))


def _removed(connection: Any, rules: SelectionRules, joined: str) -> dict[str, list[str]]:
    """Keys of some rows that each condition removes of those that the former ones leave."""
    removed = {}
    for number, text in enumerate(rules.where):
        kept, before = condition(rules, number + 1), condition(rules, number)
        where = f"{before} AND ({kept}) IS NOT TRUE ORDER BY md5(key), key LIMIT {REMOVED_EXAMPLES}"
        rows = _execute(connection, f"SELECT key FROM {joined} WHERE {where}", rules).fetchall()
        removed[text] = [key for (key,) in rows]
    return removed


def _picked(connection: Any, sql: str, rules: SelectionRules) -> Iterator[tuple[int, int, str | None, str | None]]:
    """(shard, row of its index, further tag, caption) of the selected rows, in order."""
    result = _execute(connection, sql, rules)
    while rows := result.fetchmany(1 << 16):
        yield from rows


def _write_shards(
    out: Path,
    sources: SourceFolders,
    picked: Iterator[tuple[int, int, str | None, str | None]],
    tokenizer: TextTokenizer | None,
) -> Iterator[dict[str, Any]]:
    """Write the index of each shard of the selection; yields the entries of the manifest."""
    for number, (source, rows) in enumerate(groupby(picked, key=lambda row: row[0])):
        shard, of_shard = sources.shards[source], list(rows)
        table = selected_index(shard.tar, [row for _, row, _, _ in of_shard])
        table = with_tags(table, [tag for _, _, tag, _ in of_shard])
        if tokenizer is not None:
            table = with_captions(table, [caption for _, _, _, caption in of_shard], tokenizer)
        path = out / f"shard-{number:06d}{INDEX_SUFFIX}"
        by_task = write_selected_index(path, table)
        tags = {task: Counter("|".join(t) for t in by_task[task]["tags"].to_pylist()) for task in RECORD_KEYS}
        yield {
            "name": f"shard-{number:06d}.tar",
            "tar": _relative(shard.records_tar, out),
            "bytes": shard.entry["bytes"],
            "sha256": shard.entry["sha256"],
            "index_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": {task: len(by_task[task]) for task in RECORD_KEYS},
            "tags": {task: dict(sorted(counts.items())) for task, counts in tags.items()},
            "left_out": 0,
        }


def _remove_others(out: Path, names: set[str]) -> None:
    """Remove indexes of an earlier, larger selection in the folder."""
    for path in out.glob(f"shard-*{INDEX_SUFFIX}"):
        if path.name.replace(INDEX_SUFFIX, ".tar") not in names:
            path.unlink()


def _relative(tar: str, out: Path) -> str:
    """How the manifest in `out` names a tar: URLs as they are, paths from the folder."""
    return os.path.relpath(tar, os.path.abspath(out)) if is_local(tar) else tar


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
