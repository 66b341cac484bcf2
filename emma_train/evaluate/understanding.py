"""The eleven understanding benchmarks of the paper, how each harness names them, and VLMEvalKit's scores beside the
paper's (its mean is 79.6, and 79.2 without the vision experts).

python -m emma_train.evaluate.understanding OUT/emma/status.json [OUT/emma-no-experts/status.json ...]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emma_train.errors import UserError

PAPER_MEAN, PAPER_MEAN_WITHOUT_EXPERTS = 79.6, 79.2


@dataclass(frozen=True)
class UnderstandingBenchmark:
    """One benchmark."""

    name: str
    paper: float
    """EMMA-4B's score, in per cent."""
    vlmevalkit: str
    """Its data set in VLMEvalKit."""
    lmms_eval: str
    """Its task in lmms-eval."""
    split: str
    metric: str
    """As VLMEvalKit computes it."""
    judge: str = ""
    """What must score answers: a chat model behind an API; empty where the metric alone does."""
    percent: float = 1
    """What makes VLMEvalKit's primary metric per cent."""


UNDERSTANDING = (
    UnderstandingBenchmark(
        "MMBench", 85.8, "MMBench_DEV_EN_V11", "mmbench_en_dev", "dev", "circular accuracy", percent=100
    ),
    UnderstandingBenchmark("MMMU", 62.5, "MMMU_DEV_VAL", "mmmu_val", "val", "accuracy", percent=100),
    UnderstandingBenchmark("MMVet", 73.0, "MMVet", "mmvet", "test", "judged, 0 to 1", "GPT-4, always"),
    UnderstandingBenchmark("ChartQA", 88.0, "ChartQA_TEST", "chartqa", "test", "relaxed accuracy"),
    UnderstandingBenchmark("DocVQA", 95.9, "DocVQA_VAL", "docvqa_val", "val", "ANLS"),
    UnderstandingBenchmark("TextVQA", 79.5, "TextVQA_VAL", "textvqa_val", "val", "VQA accuracy"),
    UnderstandingBenchmark("InfoVQA", 77.7, "InfoVQA_VAL", "infovqa_val", "val", "ANLS"),
    UnderstandingBenchmark(
        "OCRBench", 89.0, "OCRBench", "ocrbench", "test", "answers that hold the text, of 1,000", percent=0.1
    ),
    UnderstandingBenchmark(
        "MathVista", 75.8, "MathVista_MINI", "mathvista_testmini", "testmini", "accuracy", "GPT-4, extracts answers"
    ),
    UnderstandingBenchmark("AI2D", 83.9, "AI2D_TEST", "ai2d", "test", "accuracy", percent=100),
    UnderstandingBenchmark("MMStar", 64.8, "MMStar", "mmstar", "val", "accuracy", percent=100),
)
"""DocVQA and InfoVQA have answers for their validation splits only; the paper does not say which it took."""


def kit_scores(status_file: Path) -> dict[str, float]:
    """Benchmark -> per cent, of those that have a score in VLMEvalKit's status.json. Raises UserError."""
    try:
        datasets = json.loads(status_file.read_bytes())["datasets"]
        metrics = {
            name: entry["metrics"][entry["primary_metric"]] for name, entry in datasets.items() if "metrics" in entry
        }
        return {b.name: b.percent * float(metrics[b.vlmevalkit]) for b in UNDERSTANDING if b.vlmevalkit in metrics}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{status_file}: is no status.json of VLMEvalKit ({type(error).__name__}: {error}); "
            "name WORK_DIR/emma/status.json"
        ) from None


def mean_score(scores: Mapping[str, float]) -> float:
    """The paper's mean over the eleven, in per cent. Raises ValueError where one is missing: a mean over fewer is no
    comparison."""
    missing = [benchmark.name for benchmark in UNDERSTANDING if benchmark.name not in scores]
    if missing:
        raise ValueError(f"no score of {', '.join(missing)}")
    return sum(scores[benchmark.name] for benchmark in UNDERSTANDING) / len(UNDERSTANDING)


def comparison(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: a row for each benchmark, the paper, and a column for each run (name -> scores)."""
    lines = [f"| benchmark | paper | {' | '.join(runs)} |", "|---|---|" + "---|" * len(runs)]
    for b in UNDERSTANDING:
        cells = [f"{scores[b.name]:.1f}" if b.name in scores else "" for scores in runs.values()]
        lines.append(f"| {b.name} | {b.paper} | {' | '.join(cells)} |")
    means = []
    for scores in runs.values():
        try:
            means.append(f"{mean_score(scores):.1f}")
        except ValueError as error:
            means.append(str(error))
    paper = f"{PAPER_MEAN} ({PAPER_MEAN_WITHOUT_EXPERTS} without experts)"
    return "\n".join([*lines, f"| mean | {paper} | {' | '.join(means)} |"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison of runs of VLMEvalKit, each named by its folder. Returns the exit code."""
    paths = [Path(path) for path in (sys.argv[1:] if arguments is None else arguments)]
    try:
        if not paths:
            raise UserError("name one status.json of VLMEvalKit or more")
        sys.stdout.write(comparison({path.parent.name: kit_scores(path) for path in paths}) + "\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
