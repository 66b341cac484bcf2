"""One self-contained HTML page about a set: counts, licences, provenance, columns, removals, a contact sheet."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines.prepare.annotate import located_column_file, reject_file
from data_pipelines.prepare.materialize import licences
from data_pipelines.prepare.operator import METADATA_KEY
from data_pipelines.prepare.select_rows import SourceFolders, SourceShard, read_sources
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.shards.images import display_size, load_image, open_image
from data_pipelines.shards.index import index_path, read_manifest
from data_pipelines.shards.record_map import read_map
from emma_train.sequence.seeds import seed_of

THUMBNAIL = 160
"""Longest side of an image of the page, in pixels."""
MAX_VALUES = 200_000
"""Values of a column that its histogram shows; of more, the first of each shard are taken."""
BINS = 24
"""Bands of a histogram. Up to half as many different values are listed in its stead."""
_BATCH_ROWS = 1 << 16
CARD_STYLE = Path(__file__).with_name("card.css")


def card(folder: Path, num_images: int = 24) -> str:
    """The page of a folder of shards or of a selection. Raises UserError."""
    manifest, sources = read_manifest(folder), read_sources([folder])
    provenance = manifest.get("provenance", {})
    parts = [
        f"<h1>{_text(folder.name)}</h1>",
        _counts(manifest),
        _licences(provenance),
        _rules(provenance),
        *(_operator(sources, name) for name in sources.operators),
        "<h2>Contact sheet</h2>",
        f'<div class="grid">{"".join(_figures(sources.shards, num_images))}</div>',
        f"<h2>Provenance</h2><pre>{_text(json.dumps(provenance, indent=1, ensure_ascii=False))}</pre>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{_text(folder.name)}</title><style>{CARD_STYLE.read_text(encoding='utf-8')}</style>"
    return f"<!doctype html><html lang=en><head>{head}{title}</head><body>{''.join(parts)}</body></html>\n"


def _counts(manifest: Mapping[str, Any]) -> str:
    shards = manifest["shards"]
    rows = [
        ("shards", f"{len(shards):,}"),
        ("size of their tars", f"{sum(shard['bytes'] for shard in shards) / 1e9:,.3f} GB"),
        *((f"samples of {task}", f"{number:,}") for task, number in manifest["samples"].items() if number),
        ("records left out by the index", f"{sum(shard['left_out'] for shard in shards):,}"),
    ]
    tags: Counter[str] = Counter()
    for shard in shards:
        for task, counts in shard["tags"].items():
            for names, number in counts.items():
                tags.update({f"{task} tagged {name}": number for name in names.split("|") if name})
    rows += [(name, f"{number:,}") for name, number in tags.most_common(12)]
    return "<h2>Counts</h2>" + _table(rows)


def _licences(provenance: Mapping[str, Any]) -> str:
    names = licences(provenance)
    text = ", ".join(names) if names else "none is noted in the provenance; find out before you use the set"
    return f"<h2>Licences</h2><p>{_text(text)}</p>"


def _rules(provenance: Mapping[str, Any]) -> str:
    """What a selection left after each rule, with records that the rule removed."""
    if "rows_left" not in provenance:
        return ""
    rows, before = [], None
    for name, number in provenance["rows_left"].items():
        removed = "" if before is None else f"{number - before:,}".replace("-", "−")
        keys = ", ".join(provenance.get("removed", {}).get(name, []))
        rows.append((name, f"{number:,}", removed, keys))
        before = number
    head = "<tr><th>rule<th>rows left<th>removed<th>some of the removed</tr>"
    cells = "<td>{}<td class=n>{}<td class=n>{}<td class=keys>{}"
    body = "".join(f"<tr>{cells.format(*map(_text, row))}</tr>" for row in rows)
    options = json.dumps(provenance.get("selection", {}), ensure_ascii=False)
    return f"<h2>Selection</h2><table>{head}{body}</table><pre>{_text(options)}</pre>"


def _operator(sources: SourceFolders, name: str) -> str:
    """Histogram of each column of an operator, and what it rejected."""
    tables, identity, reasons, examples = [], {}, Counter[str](), dict[str, str]()
    limit = -(-MAX_VALUES // len(sources.shards))
    for shard in sources.shards:
        path = located_column_file(shard.tar, shard.records_tar, name)
        if path is None:
            continue
        file = pq.ParquetFile(path)
        identity = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        keys = None if Path(shard.records_tar) == shard.tar else _selected_keys(shard)
        table = _first_rows(file, keys, limit)
        tables += [table.replace_schema_metadata()] if len(table) else []
        for key, reason in _rejects(path):
            if keys is None or key in keys:
                reasons[reason] += 1
                examples.setdefault(reason, key)
    if not tables:
        return ""
    joined = pa.concat_tables(tables, promote_options="permissive")
    charts = [_chart(column, joined[column]) for column in joined.column_names if column != "key"]
    settings = ", ".join(f"{key} = {value}" for key, value in identity.get("settings", {}).items())
    title = f"<h2>{_text(name)}</h2><p>version {identity.get('version', '?')} {_text(settings)}</p>"
    rejected = ""
    if reasons:
        rows = [(reason, f"{number:,}", f"such as {examples[reason]}") for reason, number in reasons.most_common(8)]
        rejected = f"<h3>Rejected: {sum(reasons.values()):,}</h3>" + _table(rows)
    return f'{title}<div class="charts">{"".join(charts)}</div>{rejected}'


def _selected_keys(shard: SourceShard) -> set[str]:
    """Keys of the records of a selection's shard: its columns stand beside the shard that they are taken of."""
    return set(pq.read_table(index_path(shard.tar), columns=["key"])["key"].to_pylist())


def _first_rows(file: pq.ParquetFile, keys: set[str] | None, limit: int) -> pa.Table:
    """The first rows of a column file, at most `limit`; with `keys`, of those records alone."""
    wanted, batches, num = None if keys is None else pa.array(sorted(keys), pa.string()), [], 0
    for batch in file.iter_batches(min(limit, _BATCH_ROWS)):
        if wanted is not None:
            batch = batch.filter(pc.is_in(batch["key"], wanted))
        batches.append(batch.slice(0, limit - num))
        num += len(batches[-1])
        if num >= limit:
            break
    return pa.Table.from_batches(batches, file.schema_arrow)


def _rejects(columns: Path) -> Iterator[tuple[str, str]]:
    operator = columns.name.removesuffix(".parquet").rpartition(".")[2]
    path = reject_file(columns.with_name(columns.name.removesuffix(f".{operator}.parquet") + ".tar"), operator)
    if path.exists():
        for line in path.read_bytes().splitlines():  # of text they would be split at U+2028 and alike, too
            row = json.loads(line)
            yield row["key"], row["reason"]


def _chart(name: str, column: pa.ChunkedArray) -> str:
    """Bars of a column: bands of numbers, or the most frequent values."""
    nulls = f", {column.null_count:,} null" if column.null_count else ""
    while pa.types.is_list(column.type):
        column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = np.asarray(column.drop_null().to_numpy(), dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return f"<div><h3>{_text(name)}</h3>no value{nulls}</div>"
        distinct = np.unique(values, return_counts=True)
        if len(distinct[0]) <= BINS // 2:
            rows = [(_number(value), f"{number:,}") for value, number in zip(*distinct, strict=True)]
            return f"<div><h3>{_text(name)}</h3>{_table(rows)}{nulls.removeprefix(', ')}</div>"
        try:
            with np.errstate(all="ignore"):
                counts, edges = np.histogram(values, BINS)
        except ValueError:  # there are not so many numbers between the lowest and the highest
            return f"<div><h3>{_text(name)}</h3>{_number(values.min())} to {_number(values.max())}{nulls}</div>"
        labels = [f"{_number(low)} to {_number(high)}" for low, high in zip(edges, edges[1:], strict=False)]
        middle = _number(float(np.median(values)))
        caption = f"{_number(values.min())} to {_number(values.max())}, median {middle}{nulls}"
        return f"<div><h3>{_text(name)}</h3>{_bars(counts.tolist(), labels)}{caption}</div>"
    frequent = Counter(str(value)[:60] for value in column.drop_null().to_pylist()).most_common(BINS // 2)
    rows = [(value, f"{number:,}") for value, number in frequent]
    return f"<div><h3>{_text(name)}</h3>{_table(rows)}{nulls.removeprefix(', ')}</div>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:,.4g}"


def _bars(counts: Sequence[int], labels: Sequence[str], width: int = 240, height: int = 80) -> str:
    step, top = width / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - count / top * height:.1f}" width="{step - 1:.1f}" '
        f'height="{count / top * height:.1f}" fill="#3f7cc4"><title>{_text(label)}: {count:,}</title></rect>'
        for i, (count, label) in enumerate(zip(counts, labels, strict=True))
    )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{bars}</svg>'


def _figures(shards: Sequence[SourceShard], num: int) -> Iterator[str]:
    """Thumbnails of `num` records, a few from each of some shards, the same each time."""
    order = sorted(shards, key=lambda shard: seed_of(0, 0, str(shard.tar.name), "contact sheet"))[:num]
    per_shard = -(-num // max(1, len(order)))
    left = num
    for shard in order:
        rows: dict[str, dict[str, Any]] = {}
        for row in pq.read_table(index_path(shard.tar)).to_pylist():
            rows.setdefault(row["key"], {})[row["task"]] = row
        keys = sorted(rows, key=lambda key: seed_of(0, 0, key, "contact sheet"))
        record_map = read_map(Path(shard.records_tar).parent)
        with open(shard.records_tar, "rb") as file:
            for key in keys[: min(per_shard, left)]:
                left -= 1
                yield _figure(StoredRecord(key, rows[key], file, {}, record_map))


def _figure(record: StoredRecord) -> str:
    try:
        images = "".join(f'<img alt="" src="{thumbnail(data)}">' for data in list(record.images.values())[:2])
        texts = record.texts()
    except (OSError, ValueError, SyntaxError) as error:
        images, texts = "", [f"cannot be read: {error}"]
    caption = " / ".join(text[:120] for text in texts[:2])
    return f"<figure>{images}<figcaption>{_text(caption)}<br>{_text(record.key)}</figcaption></figure>"


def thumbnail(data: bytes | memoryview) -> str:
    """A small copy of an image as a data URL. Raises OSError or ValueError."""
    with open_image(data) as image:
        width, height = display_size(image)
        scale = THUMBNAIL / max(width, height)
        pixels = load_image(image, max(1, round(height * scale)), max(1, round(width * scale)))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    def cell(number: int, text: str) -> str:
        return f"<td{' class=n' if number == 1 else ''}>{_text(text)}"

    return "<table>" + "".join(f"<tr>{''.join(map(cell, range(9), row))}</tr>" for row in rows) + "</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
