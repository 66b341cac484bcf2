"""The index of a selection's shard: rows of a shard's index, with further tags and captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.shards.index import CAPTIONS, INDEX_SCHEMA, index_path
from data_pipelines.shards.record import CAPTION_QUESTION, alternative_layout, caption_alternative
from emma_train.errors import UserError
from emma_train.sequence import layout
from emma_train.sequence.tasks import RECORD_KEYS, TASKS
from emma_train.sequence.tokens import TextTokenizer


def selected_index(tar: Path, rows: Sequence[int]) -> pa.Table:
    """Some rows of a shard's index, with the captions that it has if it is of a selection."""
    names = pq.read_schema(index_path(tar)).names
    table = pq.read_table(index_path(tar), columns=[name for name in (*INDEX_SCHEMA.names, CAPTIONS) if name in names])
    return table.take(pa.array(rows, pa.int64())).replace_schema_metadata()


def with_tags(table: pa.Table, further: Sequence[str | None]) -> pa.Table:
    """Index rows with one further tag each; None and "" add none. Raises UserError."""
    if not any(further):
        return table
    if bad := next((tag for tag in further if tag and "|" in tag), None):
        raise UserError(f"--tag: gives {bad!r}; a tag is a word without |")
    pairs = zip(table["tags"].to_pylist(), further, strict=True)
    tags = [sorted({*known, new}) if new else known for known, new in pairs]
    return _replaced(table, "tags", tags)


def with_captions(table: pa.Table, captions: Sequence[str | None], tokenizer: TextTokenizer) -> pa.Table:
    """Index rows with one further alternative each: a caption of the record's image. Rows without a caption, of
    records with another number of images, and of edits stay as they are."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row, caption in zip(rows, captions, strict=True):
        row[CAPTIONS] = list(row.get(CAPTIONS) or [])
        task = TASKS[row["task"]]
        if caption is None or not caption.strip() or len(row["widths"]) != 1 or row["task"] == "it2i":
            continue
        alternative = caption_alternative(task, "img0", caption.strip(), CAPTION_QUESTION)
        text, supervised = layout.num_text_tokens(alternative_layout(alternative, row["task"], tokenizer))
        row[CAPTIONS].append(caption.strip())
        row["text_tokens"].append(text)
        row["supervised_tokens"].append(supervised)
        row["context"].append([] if task.makes_image else [0])
        row["target"].append(0 if task.makes_image else -1)
    return pa.Table.from_pylist(rows, INDEX_SCHEMA.append(pa.field(CAPTIONS, pa.list_(pa.string()))))


def write_selected_index(path: Path, table: pa.Table) -> dict[str, pa.Table]:
    """Write rows as an index, each task in its own row groups; returns them by task."""
    tasks = table["task"].to_pylist()
    by_task = {
        task: table.take(pa.array([i for i, of_row in enumerate(tasks) if of_row == task], pa.int64()))
        for task in RECORD_KEYS
    }
    further = [field for field in table.schema if field.name not in INDEX_SCHEMA.names]
    schema = pa.schema([*INDEX_SCHEMA, *further])
    temporary = path.with_name(f"{path.name}.tmp")
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for of_task in by_task.values():
            if len(of_task):
                writer.write_table(of_task.cast(schema), row_group_size=1 << 16)
    temporary.replace(path)
    return by_task


def _replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    number = table.column_names.index(name)
    return table.set_column(number, name, pa.array(values, table.schema.field(name).type))
