"""The benchmarks, each by the layout that its official scorer reads (docs/evaluation.md has the traps)."""

import io
import json
from pathlib import Path

from PIL import Image

from emma_train.errors import UserError
from emma_train.evaluate import read_items, score_dpg, score_edits, score_prompts
from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem, reading
from emma_train.evaluate.image_folder import png


def _geneval_metadata(item: BenchmarkItem) -> dict[str, bytes]:
    """The scorer parses the file at once, so it holds one object."""
    return {f"{item.number:05d}/metadata.jsonl": json.dumps(item.metadata).encode()}


def _gedit_source(item: BenchmarkItem) -> dict[str, bytes]:
    """The image with which the judge compares the edit, as it is."""
    assert item.reference is not None
    with reading(item.reference), Image.open(io.BytesIO(item.reference.read())) as image:
        return {f"{GEDIT_FOLDER}/{item.name}_SRCIMG.png": png(image.convert("RGB"))}


GEDIT_FOLDER = "emma/fullset"
"""{model}/fullset of the scorer, whose --model_name is emma."""
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "geneval",
            read_items.geneval_items,
            "{item.number:05d}/samples/{sample:05d}.png",
            num_items=553,
            score=score_prompts.score_geneval,
            num_samples=4,
            companions=_geneval_metadata,
        ),
        Benchmark(
            "dpg",
            read_items.dpg_items,
            "{item.name}.png",
            num_items=1065,
            score=score_dpg.score_dpg,
            num_samples=4,
            is_grid=True,
        ),
        Benchmark(
            "gedit",
            read_items.gedit_items,
            f"{GEDIT_FOLDER}/{{item.name}}.png",
            num_items=1212,
            score=score_edits.score_gedit,
            languages=("en", "cn"),
            companions=_gedit_source,
            scorer_files=("emma/*/eval_results_new", "emma/*/eval_results_new/*"),
        ),
        Benchmark(
            "imgedit",
            read_items.imgedit_items,
            "{item.name}.png",
            num_items=737,
            score=score_edits.score_imgedit,
            scorer_files=("result.json",),
        ),
        Benchmark("wise", read_items.wise_items, "{item.name}.png", num_items=1000, score=score_prompts.score_wise),
        Benchmark(
            "geneval2",
            read_items.geneval2_items,
            "{item.name}.png",
            num_items=800,
            score=score_prompts.score_geneval2,
            index_file="geneval2_images.json",
        ),
    )
}


def read_benchmark(name: str, data: Path, language: str = "") -> tuple[Benchmark, list[BenchmarkItem]]:
    """A benchmark and its items, in the official order. Raises UserError."""
    benchmark = BENCHMARKS[name]
    if language and language not in benchmark.languages:
        raise UserError(f"--language {language}: {name} has no such language; leave the option out")
    return benchmark, read_items.check_names(benchmark.read_items(data, language), data)
