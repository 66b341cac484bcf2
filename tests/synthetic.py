"""A data set of any size that only has an index; its rows are computed when they are read.

Lengths are those of Stage 1: images of 512 pixels, answers of 20 to 4,000 tokens (lognormal, mean about 190), prompts
of 15 to 400 (mean about 90). It can be planned but not read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from data_pipelines.planner import sources
from data_pipelines.shards.index import INDEX_SCHEMA
from tests.helpers import tokenizer

TASKS = ("i2t", "t2i", "it2i")
TEXT = {"i2t": (4.8, 0.9, 20, 4000), "t2i": (4.3, 0.6, 15, 400), "it2i": (3.9, 0.5, 15, 300)}
"""Mean and deviation of the logarithm, least and most text tokens."""


@contextmanager
def synthetic(rows_per_task: int, rows_per_shard: int = 10_000) -> Iterator[None]:
    """Within the block, every folder has this many rows of each task."""
    num_shards, rest = divmod(rows_per_task, rows_per_shard)
    sizes = [rows_per_shard] * num_shards + [rest] * (rest > 0)
    manifest = {
        "tokenizer_sha256": tokenizer().sha256,
        "shards": [
            {
                "name": f"{i:06d}.tar",
                "sha256": f"{i:064x}",
                "index_sha256": "",
                "bytes": 0,
                "tags": {task: {"": size} for task in TASKS},
            }
            for i, size in enumerate(sizes)
        ],
    }
    with (
        patch.object(sources, "read_manifest", lambda folder, storage: manifest),
        patch.object(sources, "read_columns", lambda folder, name, task, *_: rows(int(name[:6]), task, sizes)),
    ):
        yield


def rows(shard: int, task: str, sizes: list[int]) -> pa.Table:
    """The index rows of a task of one shard."""
    num = sizes[shard]
    rng = np.random.default_rng([shard, TASKS.index(task)])
    mean, deviation, least, most = TEXT[task]
    text = np.clip(rng.lognormal(mean, deviation, num), least, most).astype(np.int32)
    images = {"i2t": 1, "t2i": 1, "it2i": 2}[task]
    sides = np.full(num * images, 512, dtype=np.int32)
    context = pa.array(np.zeros(num if task != "t2i" else 0, dtype=np.int16))
    shown = np.arange(num + 1, dtype=np.int32) * (task != "t2i")
    columns: dict[str, Any] = {
        "key": pa.array(np.char.add(f"{task}-{shard:06d}-", np.arange(num).astype("U6"))),
        "task": pa.array([task] * num),
        "offset": pa.array(np.arange(num) * 100_000),
        "size": pa.array(np.full(num, 100_000)),
        "crc32": pa.array(np.zeros(num, dtype=np.uint32)),
        "text_tokens": _lists(text, 1),
        "supervised_tokens": _lists(text, 1),
        "context": pa.ListArray.from_arrays(
            pa.array(np.arange(num + 1, dtype=np.int32)), pa.ListArray.from_arrays(pa.array(shown), context)
        ),
        "target": _lists(np.full(num, {"i2t": -1, "t2i": 0, "it2i": 1}[task], dtype=np.int16), 1),
        "widths": _lists(sides, images),
        "heights": _lists(sides, images),
        "tags": pa.array([[]] * num, pa.list_(pa.string())),
    }
    planned = [name for name in sources.PLANNED if name in INDEX_SCHEMA.names]
    return pa.table({name: columns[name].cast(INDEX_SCHEMA.field(name).type) for name in planned})


def _lists(values: np.ndarray, length: int) -> pa.ListArray:
    starts = np.arange(0, len(values) + 1, length, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(values))
