"""Measures the preparation of data: records/s of operators that need no model, selecting, materializing.

--rows     synthetic index rows for select, in files of 1,250,000 (default 2,000,000; 50,000,000 takes minutes)
--records  records of the shards that operators read
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from data_pipelines.prepare.annotate import OperatorChoice, annotate_shard, annotate_tasks  # noqa: E402
from data_pipelines.prepare.jobs import JobOptions, do_task  # noqa: E402
from data_pipelines.prepare.materialize import materialize  # noqa: E402
from data_pipelines.prepare.select_rows import (  # noqa: E402
    EngineLimits,
    SourceFolders,
    SourceShard,
    connect_duckdb,
    joined_sql,
    read_sources,
    select_rows,
)
from data_pipelines.prepare.selection_rules import SelectionRules, aspect_bucket, selection_sql  # noqa: E402
from data_pipelines.shards.build_index import index_folder  # noqa: E402
from data_pipelines.shards.write import ShardWriter, webp  # noqa: E402

ROWS_PER_FILE = 1_250_000
OPERATORS = ("size", "language", "phash", "stem", "quality")
TOKENIZER = ROOT / "recipes" / "tiny" / "assets" / "tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one flat JSON object")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gib", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = operator_figures(Path(folder) / "set", arguments.records)
        limits = EngineLimits(arguments.memory_gib, arguments.threads)
        figures |= select_figures(Path(folder) / "rows", arguments.rows, limits)
    for name, value in figures.items():
        sys.stdout.write(f"{name:32} {value:,.2f}\n")
    if arguments.json:
        sys.stdout.write(json.dumps({name: round(value, 3) for name, value in figures.items()}) + "\n")


def operator_figures(folder: Path, num: int) -> dict[str, float]:
    """Records per second and core of each operator, and MB/s of materialize against copying the tar."""
    from PIL import Image

    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    with ShardWriter(folder, max_samples=num) as writer:
        for number in range(num):
            image = Image.fromarray(smooth[number]).resize((512, 512), Image.Resampling.BICUBIC)
            record = {"t2i": [{"target": "img0", "text": f"a smooth image of eight colours, number {number}"}]}
            writer.write(f"r{number}", record, {"img0": webp(image, 80)})
    index_folder(folder, TOKENIZER, {})
    figures = {}
    for name in OPERATORS:
        (task,) = annotate_tasks([folder], OperatorChoice(name))
        figures[f"{name}_records_per_s"] = num / seconds(lambda: do_task(task, annotate_shard))  # noqa: B023
    select_rows(folder.parent / "selection", read_sources([folder]), SelectionRules(), EngineLimits(1, 1))
    size = next(folder.glob("*.tar")).stat().st_size / 1e6
    copy = seconds(lambda: (folder.parent / "copy.tar").write_bytes(next(folder.glob("*.tar")).read_bytes()))
    copied = folder.parent / "materialized"
    figures["materialize_mb_per_s"] = size / seconds(
        lambda: materialize(folder.parent / "selection", copied, TOKENIZER, JobOptions())
    )
    return figures | {"tar_copy_mb_per_s": size / copy}


def select_figures(folder: Path, num_rows: int, limits: EngineLimits) -> dict[str, float]:
    """Seconds and memory of a balanced selection over synthetic index and column files."""
    folder.mkdir()
    shards = []
    for number, first in enumerate(range(0, num_rows, ROWS_PER_FILE)):
        tar = folder / f"shard-{number:06d}.tar"
        write_rows(tar, first, min(ROWS_PER_FILE, num_rows - first))
        shards.append(SourceShard(tar, {}, str(tar)))
    sources = SourceFolders((folder,), tuple(shards), "", ())
    rules = SelectionRules(
        where=("score.value > 4", "score.width >= 512"),
        balance="score.kind",
        spread=aspect_bucket("score.width", "score.height"),
        best="score.value",
        top=200_000,
    )
    connection = connect_duckdb(folder / "spill", limits)
    selected = []

    def select() -> None:
        sql = selection_sql(rules, joined_sql(connection, sources, ["score"]))
        result = connection.execute(sql)
        selected.append(sum(len(rows) for rows in iter(lambda: result.fetchmany(1 << 16), [])))

    elapsed = seconds(select)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"select_rows": num_rows, "select_s": elapsed, "select_peak_gib": peak, "selected": sum(selected)}


def write_rows(tar: Path, first: int, num: int) -> None:
    """An index with the columns that rules use, and a column file."""
    rng = np.random.default_rng(first)
    keys = pa.array([f"{number:012d}" for number in range(first, first + num)])
    index = {"key": keys, "task": pa.array(["t2i"] * num), "offset": np.arange(num), "size": np.full(num, 1)}
    pq.write_table(pa.table(index), tar.with_suffix(".idx.parquet"), compression="zstd")
    columns = {
        "key": keys,
        "value": rng.normal(5, 1, num).astype(np.float32),
        "width": rng.integers(256, 2048, num).astype(np.int32),
        "height": rng.integers(256, 2048, num).astype(np.int32),
        "kind": pa.array(np.array(["portrait", "general", "general"])[rng.integers(0, 3, num)]),
    }
    pq.write_table(pa.table(columns), tar.with_suffix(".score.parquet"), compression="zstd")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
