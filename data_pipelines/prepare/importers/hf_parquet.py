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
from data_pipelines.prepare.importers.item import ImportedSample, ImportOptions, ImportPart, Outcome
from data_pipelines.prepare.importers.parquet_rows import parquet_columns, row_outcomes
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
    make = partial(_sample, fields, scalar_columns(file))
    return row_outcomes(file, make, config, (), parquet_columns(file), "", start)


def _sample(fields: dict[str, str], kept: list[str], row: dict[str, Any], name: str, config: str) -> ImportedSample:
    return replace(mapped_sample(row, fields, name), columns={key: row[key] for key in kept}, config=config)


def scalar_columns(file: Path) -> list[str]:
    """Columns of numbers and texts, which become columns of the records."""
    schema = pq.read_schema(file) if parquet_columns(file) else pa.schema([])
    checks = (kinds.is_integer, kinds.is_floating, kinds.is_string)
    return [field.name for field in schema if any(check(field.type) for check in checks)]
