"""Any parquet set, with `--map` from the fields of a record to its columns."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from data_pipelines.prepare.importers.field_map import check_map, mapped_sample
from data_pipelines.prepare.importers.item import ImportedSample, ImportOptions, ImportPart, Outcome, Reject, outcome
from data_pipelines.prepare.importers.parquet_rows import parquet_columns, parquet_rows
from data_pipelines.prepare.importers.source_files import config_name, relative_name, source_files


def hf_parquet_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """One part for each parquet file. Raises UserError where the map makes no sample."""
    files = source_files(source, (".parquet",))
    if files:
        check_map(options.fields)
    return [
        ImportPart(relative_name(file, source), partial(_read, file, dict(options.fields), config_name(file, source)))
        for file in files
    ]


def _read(file: Path, fields: dict[str, str], config: str, start: int) -> Iterator[Outcome]:
    kept = scalar_columns(file)
    for number, row in parquet_rows(file, (), parquet_columns(file), start):
        if isinstance(row, Reject):
            yield row
            continue
        name = f"{file.name}#{number}"
        columns = {key: row[key] for key in kept}
        yield outcome(name, row, partial(_sample, row, fields, name, columns, config))


def _sample(
    row: dict[str, Any], fields: dict[str, str], name: str, columns: dict[str, Any], config: str
) -> ImportedSample:
    return replace(mapped_sample(row, fields, name), columns=columns, config=config)


def scalar_columns(file: Path) -> list[str]:
    """Columns of numbers and texts, which become columns of the records."""
    schema = pq.read_schema(file) if parquet_columns(file) else pa.schema([])
    checks = (kinds.is_integer, kinds.is_floating, kinds.is_string)
    return [field.name for field in schema if any(check(field.type) for check in checks)]
