"""Reads rows of a parquet file by the names of its columns, some at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.prepare.importers.item import ImportedSample, ImportPart, Outcome, Reject, outcome
from data_pipelines.prepare.importers.source_files import config_name, relative_name, source_files
from data_pipelines.shards.excluded import refuse_columns

_ROWS_AT_ONCE = 32
MakeSample = Callable[[dict[str, Any], str, str], ImportedSample]
"""Row, name of the item, config of the set -> sample. A module-level function; raises ValueError and alike."""


def parquet_columns(path: Path) -> list[str]:
    """Names of a file's columns; none where it cannot be read."""
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return []


def parquet_files(source: Path, required: Sequence[str]) -> list[Path]:
    """The parquet files of a source, or none where not one of them has the required columns."""
    files = source_files(source, (".parquet",))
    return files if any(set(required) <= set(parquet_columns(path)) for path in files) else []


def parquet_part(
    file: Path,
    source: Path,
    make: MakeSample,
    required: Sequence[str],
    optional: Sequence[str] = (),
    id_column: str = "",
) -> ImportPart:
    """A file as a part: a sample or a reject for each of its rows."""
    read = partial(row_outcomes, file, make, config_name(file, source), required, optional, id_column)
    return ImportPart(relative_name(file, source), read)


def row_outcomes(
    file: Path,
    make: MakeSample,
    config: str,
    required: Sequence[str],
    optional: Sequence[str],
    id_column: str,
    start: int,
) -> Iterator[Outcome]:
    """What `make` makes of each row from row `start` on. A row is named by its `id_column`, or by its number where it
    has none."""
    for number, row in parquet_rows(file, required, optional, start):
        if isinstance(row, Reject):
            yield row
        else:
            name = str(row.get(id_column) or f"{file.name}#{number}")
            yield outcome(name, row, partial(make, row, name, config))


def parquet_rows(
    path: Path, required: Sequence[str], optional: Sequence[str], start: int
) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """(number, row) from row `start` on: its required columns, and those of the optional ones that the file has.

    Rows that cannot be read are one Reject for each row group; a file that cannot be read is one without a count.
    Raises UserError where the columns are those of the excluded set.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        refuse_columns(names, path)
    except (OSError, pa.ArrowException) as error:
        yield 0, Reject(path.name, f"no parquet file that can be read: {_one_line(error)}", 0)
        return
    with file:
        num_rows = file.metadata.num_rows
        if missing := [name for name in required if name not in names]:
            if start < num_rows:
                reason = f"no column {', '.join(missing)}; it has {', '.join(names)}"
                yield start, Reject(path.name, reason, num_rows - start)
            return
        wanted = list(dict.fromkeys(name for name in (*required, *optional) if name in names))
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > start:
                yield from _group_rows(file, path, group, wanted, first, end, start)
            first = end


def _group_rows(
    file: pq.ParquetFile, path: Path, group: int, columns: list[str], first: int, end: int, start: int
) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    number = first
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            for offset in range(len(batch)):
                if number >= start:
                    yield number, batch.slice(offset, 1).to_pylist()[0]
                number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        position = max(number, start)
        reason = f"rows {position} to {end - 1} cannot be read: {_one_line(error)}"
        yield position, Reject(path.name, reason, end - position)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
