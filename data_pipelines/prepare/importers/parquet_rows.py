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
MAX_EXPANSION = 200
"""A row group of more than MAX_EXPANDED_BYTES that is so many times larger than in the file is a decompression bomb:
images do not compress, and texts by 2 to 20."""
MAX_EXPANDED_BYTES = 256 << 20
_HIGH_EXPANSION = 20
"""Above it, a value may stand in the file once and in many rows."""
MAX_BATCH_BYTES = 1 << 30
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
        rows_at_once = safe_batch_rows(file.metadata, group, columns, _ROWS_AT_ONCE)
        for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=columns, use_threads=False):
            for offset in range(len(batch)):
                if number >= start:
                    yield number, batch.slice(offset, 1).to_pylist()[0]
                number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError, ExpansionError) as error:
        position = max(number, start)
        reason = f"rows {position} to {end - 1} cannot be read: {_one_line(error)}"
        yield position, Reject(path.name, reason, end - position)


class ExpansionError(Exception):
    """A row group that would unpack to far more than the file has."""


def safe_batch_rows(metadata: pq.FileMetaData, group: int, columns: Sequence[str], rows: int) -> int:
    """How many rows of a row group can be read at once, at most `rows`, so that columns in which few values stand for
    many rows fit memory. Raises ExpansionError."""
    row_group = metadata.row_group(group)
    chunks = [row_group.column(number) for number in range(row_group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    largest = 0
    for chunk in chunks:
        size, stored = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
        if size > MAX_EXPANDED_BYTES and size > MAX_EXPANSION * stored:
            raise ExpansionError(
                f"column {chunk.path_in_schema} unpacks from {stored:,} to {size:,} bytes, a decompression bomb"
            )
        if size > _HIGH_EXPANSION * stored:
            largest = max(largest, size)
    return max(1, min(rows, MAX_BATCH_BYTES // max(1, largest)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
