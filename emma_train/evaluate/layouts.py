"""The benchmarks, each by the layout that its official scorer reads (docs/evaluation.md has the traps)."""

import json
from pathlib import Path

from emma_train.evaluate import read_items
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem


def _geneval_metadata(item: BenchmarkItem) -> dict[str, bytes]:
    """The scorer parses the file at once, so it holds one object."""
    return {f"{item.number:05d}/metadata.jsonl": json.dumps(item.metadata).encode()}


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "geneval",
            read_items.geneval_items,
            "{item.number:05d}/samples/{sample:05d}.png",
            num_items=553,
            num_samples=4,
            companions=_geneval_metadata,
        ),
        Benchmark("dpg", read_items.dpg_items, "{item.name}.png", num_items=1065, num_samples=4, is_grid=True),
    )
}


def read_benchmark(name: str, data: Path, language: str = "") -> tuple[Benchmark, list[BenchmarkItem]]:
    """A benchmark and its items, in the official order. Raises UserError."""
    benchmark = BENCHMARKS[name]
    return benchmark, read_items.check_names(benchmark.read_items(data, language), data)
