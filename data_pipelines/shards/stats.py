"""Statistics of shard folders, from manifests and indexes alone: samples, lengths, images, tags."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table

from data_pipelines.shards.index import read_columns, read_manifest
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.storage.shard_reader import ShardReader

PERCENTILES = (5, 50, 95, 99, 100)
ASPECTS = (("4:1 +", 2.6), ("2:1", 1.6), ("4:3", 1.15), ("1:1", 1 / 1.15), ("3:4", 1 / 1.6), ("1:2", 1 / 2.6))
"""(name, lowest width / height) of the bands of aspect ratio; narrower images are 1:4 or beyond."""
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class TaskStats:
    """One task of a folder."""

    samples: int = 0
    text_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Of each alternative."""
    supervised_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    alternatives: int = 0
    images: int = 0
    """Shown and target images, summed over alternatives."""
    tags: Counter[str] = field(default_factory=Counter)


@dataclass
class FolderStats:
    """Statistics of a folder."""

    manifest: dict[str, Any]
    records: int
    tasks: dict[str, TaskStats]
    widths: np.ndarray
    """Of every image; an image counts once for each task that uses its record."""
    heights: np.ndarray
    stem: int
    """Records with the tag stem."""


def folder_stats(folder: str | Path, storage: ShardReader | None = None) -> FolderStats:
    """Reads manifest and indexes. Raises UserError."""
    storage, manifest = storage or ShardReader(), read_manifest(folder, storage)
    records = stem = 0
    tasks = {task: TaskStats() for task in RECORD_KEYS}
    lengths: dict[str, list[np.ndarray]] = {
        f"{task} {what}": [] for task in RECORD_KEYS for what in ("text", "supervised")
    }
    sizes: dict[str, list[np.ndarray]] = {"widths": [], "heights": []}
    columns = ["key", "text_tokens", "supervised_tokens", "context", "target", "widths", "heights", "tags"]
    for shard in manifest["shards"]:
        keys: dict[str, bool] = {}
        for task, stats in tasks.items():
            if not shard["rows"].get(task):
                continue
            table = read_columns(folder, shard["name"], task, columns, storage, shard["index_sha256"])
            stats.samples += len(table)
            stats.alternatives += len(_flat(table["target"]))
            stats.images += len(_flat(_flat(table["context"]))) + int((_flat(table["target"]).to_numpy() >= 0).sum())
            lengths[f"{task} text"].append(_flat(table["text_tokens"]).to_numpy())
            lengths[f"{task} supervised"].append(_flat(table["supervised_tokens"]).to_numpy())
            for name in sizes:
                sizes[name].append(_flat(table[name]).to_numpy())
            tags = table["tags"].to_pylist()
            stats.tags.update(tag for of_row in tags for tag in of_row)
            keys.update(zip(table["key"].to_pylist(), ("stem" in of_row for of_row in tags), strict=True))
        records, stem = records + len(keys), stem + sum(keys.values())
    for task, stats in tasks.items():
        stats.text_tokens, stats.supervised_tokens = (_joined(lengths[f"{task} {w}"]) for w in ("text", "supervised"))
    return FolderStats(manifest, records, tasks, _joined(sizes["widths"]), _joined(sizes["heights"]), stem)


def overview(title: str, folders: dict[str, FolderStats]) -> Table:
    """One line per folder: records, and how many of them each task can use."""
    table = _table(f"{title}: records, and how many of them each task can use",
                   "split", "shards", "kB", "records", *RECORD_KEYS, "stem", "left out")  # fmt: skip
    for name, stats in folders.items():
        shards = stats.manifest["shards"]
        size, left_out = sum(shard["bytes"] for shard in shards) // 1000, sum(shard["left_out"] for shard in shards)
        numbers = [len(shards), size, stats.records, *stats.manifest["samples"].values(), stats.stem, left_out]
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def details(stats: FolderStats) -> list[Table]:
    """Tables of one folder: text per task, image sizes, aspect ratios and tags."""
    used = {task: of_task for task, of_task in stats.tasks.items() if of_task.samples}
    percent = [f"p{p}" if p < 100 else "max" for p in PERCENTILES]
    title = "text tokens of an alternative, alternatives of a sample, images of an alternative"
    text = _table(title, "task", *percent, "supervised", "alt.", "pict.", "0 to max")
    for task, of_task in used.items():
        tokens, per = of_task.text_tokens, max(1, of_task.alternatives)
        text.add_row(
            task,
            *(f"{v:,.0f}" for v in np.percentile(tokens, PERCENTILES)),
            f"{of_task.supervised_tokens.sum() / max(1, tokens.sum()):.0%}",
            f"{of_task.alternatives / of_task.samples:.2f}",
            f"{of_task.images / per:.2f}",
            histogram(tokens),
        )
    tables = [text]
    if len(stats.widths):
        sizes = _table("images, in pixels", "", *percent, "0 to max")
        area = np.sqrt(stats.widths.astype(np.float64) * stats.heights)
        for name, values in (("width", stats.widths), ("height", stats.heights), ("√ area", area)):
            sizes.add_row(name, *(f"{v:,.0f}" for v in np.percentile(values, PERCENTILES)), histogram(values))
        shares = aspect_shares(stats.widths, stats.heights)
        aspects = _table("aspect ratio", *shares)
        aspects.add_row(*(f"{share:.1%}" for share in shares.values()))
        tables += [sizes, aspects]
    tags = sum((of_task.tags for of_task in used.values()), Counter())
    if tags:
        table = _table("samples with a tag, the 20 most frequent", "tag", *used)
        for tag, _ in tags.most_common(20):
            table.add_row(tag, *(f"{of_task.tags[tag]:,}" for of_task in used.values()))
        tables.append(table)
    return tables


def histogram(values: np.ndarray, bins: int = 12) -> str:
    """Bars of `bins` equal bands from 0 to the largest value."""
    counts, _ = np.histogram(values, bins, (0, max(1, values.max())))
    return "".join(BARS[int(np.ceil(count * (len(BARS) - 1) / counts.max()))] for count in counts)


def aspect_shares(widths: np.ndarray, heights: np.ndarray) -> dict[str, float]:
    """Share of images in each band of aspect ratio."""
    bands = np.digitize(widths / heights, [low for _, low in ASPECTS])
    names = [name for name, _ in ASPECTS] + ["1:4 +"]
    return {name: float((bands == i).mean()) for i, name in enumerate(names)}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=len(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
