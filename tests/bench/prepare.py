"""Measures the preparation of data: records/s of operators that need no model, importing, selecting, materializing, and
memory over the number of shards.

--rows     synthetic index rows for select, in files of 1,250,000 (default 2,000,000; 50,000,000 takes minutes; 0: none)
--records  records of the shards that operators read, and of the sets that are imported
--shards   numbers of tiny shards over which the memory of the driver is measured (1,000 takes a minute)
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
from tests.public_formats import HUB_IMAGE, hub_image, jpeg, write_table, write_tar  # noqa: E402

ROWS_PER_FILE = 1_250_000
PEAK = r"""
import re, sys
from pathlib import Path
from data_pipelines.cli import main
code = main(sys.argv[1:])
print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
sys.exit(code)
"""
"""A child's ru_maxrss begins with what its parent used, before exec."""
OPERATORS = ("size", "language", "phash", "stem", "quality")
TOKENIZER = ROOT / "recipes" / "tiny" / "assets" / "tokenizer"
GREY = webp(Image.new("RGB", (32, 32), "grey"), 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one flat JSON object")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--shards", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gib", type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limits = EngineLimits(arguments.memory_gib, arguments.threads)
        figures: dict[str, float] = {}
        if arguments.rows:  # first: its peak is the process's
            figures |= select_figures(Path(folder) / "rows", arguments.rows, limits)
        figures |= operator_figures(Path(folder) / "set", arguments.records)
        figures |= import_figures(Path(folder) / "public", arguments.records)
        for num in arguments.shards:
            figures |= memory_figures(Path(folder) / f"shards{num}", num)
    for name, value in figures.items():
        sys.stdout.write(f"{name:32} {value:,.2f}\n")
    if arguments.json:
        sys.stdout.write(json.dumps({name: round(value, 3) for name, value in figures.items()}) + "\n")


def operator_figures(folder: Path, num: int) -> dict[str, float]:
    """Records per second of CPU time of each operator, and MB/s of materialize against copying the tar."""
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
        figures[f"{name}_records_per_cpu_s"] = num / cpu_seconds(lambda: do_task(task, annotate_shard))  # noqa: B023
    select_rows(folder.parent / "selection", read_sources([folder]), SelectionRules(), EngineLimits(1, 1))
    size = next(folder.glob("*.tar")).stat().st_size / 1e6
    copy = seconds(lambda: (folder.parent / "copy.tar").write_bytes(next(folder.glob("*.tar")).read_bytes()))
    copied = folder.parent / "materialized"
    figures["materialize_mb_per_s"] = size / seconds(
        lambda: materialize(folder.parent / "selection", copied, TOKENIZER, JobOptions())
    )
    return figures | {"tar_copy_mb_per_s": size / copy}


def import_figures(folder: Path, num: int) -> dict[str, float]:
    """MB/s of images that one process imports, from parquet and from tars, and of copying such a tar."""
    jpegs = [jpeg(number, 512) for number in range(num)]
    size = sum(map(len, jpegs)) / 1e6
    texts = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    schema = [("images", pa.list_(HUB_IMAGE)), ("texts", texts)]
    rows = [{"images": [hub_image(j)], "texts": [{"user": "What is this?", "assistant": "Noise."}]} for j in jpegs]
    write_table(folder / "finevision" / "0.parquet", schema, rows)
    members = [(f"{i:09d}.{end}", data) for i, j in enumerate(jpegs) for end, data in (("jpg", j), ("txt", b"Noise."))]
    write_tar(folder / "img2dataset" / "00000.tar", members)
    figures = {}
    for name in ("finevision", "img2dataset"):
        for suffix, options in (("", ()), ("_header_only", ("--header-only",))):
            out = folder / f"{name}{suffix}-out"
            words = ["import", name, folder / name, out, "--tokenizer", TOKENIZER, "--workers", 1, *options]
            before = time.process_time()
            elapsed = seconds(lambda: main_of_data(list(map(str, words))))  # noqa: B023
            figures[f"import_{name}{suffix}_mb_per_s"] = size / elapsed
            figures[f"import_{name}{suffix}_mb_per_cpu_s"] = size / (time.process_time() - before)
    tar = folder / "img2dataset" / "00000.tar"
    copied = seconds(lambda: copy_file(tar, folder / "copy.tar"))
    return figures | {"import_mb": size, "import_tar_copy_mb_per_s": tar.stat().st_size / 1e6 / copied}


def memory_figures(folder: Path, num: int) -> dict[str, float]:
    """Peak memory in MiB of the driver of each command over `num` shards of two records, in a process of its own."""
    with ShardWriter(folder / "set", max_samples=2) as writer:
        for number in range(2 * num):
            record = {"t2i": [{"target": "img0", "text": f"a grey image, number {number}"}]}
            writer.write(f"r{number}", record, {"img0": GREY})
    commands: dict[str, list[str]] = {
        "index": ["index", "set", "--tokenizer", str(TOKENIZER), "--workers", "1"],
        "annotate": ["annotate", "phash", "set", "--workers", "1"],
        "select": ["select", "selection", "--from", "set", "--where", "phash.hash IS NOT NULL", "--threads", "1"],
        "materialize": ["materialize", "selection", "copy", "--tokenizer", str(TOKENIZER), "--workers", "1"],
    }
    return {f"{name}_{num}_shards_mib": peak_mib(words, folder) for name, words in commands.items()}


def peak_mib(words: list[str], folder: Path) -> float:
    """Peak memory of a command of emma-data, run in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def main_of_data(words: list[str]) -> None:
    """One command of emma-data, which must succeed."""
    from data_pipelines.cli import main as run_command

    if run_command(words) != 0:
        raise RuntimeError(f"emma-data {' '.join(words)} failed")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and wait until it is on the disk, as an import does."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


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

    before = time.process_time()
    elapsed = seconds(select)
    cpu = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "select_rows": num_rows,
        "select_s": elapsed,
        "select_cpu_s": cpu,
        "select_peak_gib": peak,
        "selected": sum(selected),
    }


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


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process: what a free core would need, whatever else runs on the machine."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
