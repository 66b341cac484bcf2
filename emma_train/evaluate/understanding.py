"""The eleven understanding benchmarks of the paper, and how each harness names them (paper, table of understanding
results: mean 79.6, and 79.2 without the vision experts, through VLMEvalKit)."""

from collections.abc import Mapping
from dataclasses import dataclass

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


UNDERSTANDING = (
    UnderstandingBenchmark("MMBench", 85.8, "MMBench_DEV_EN_V11", "mmbench_en_dev", "dev", "circular accuracy"),
    UnderstandingBenchmark("MMMU", 62.5, "MMMU_DEV_VAL", "mmmu_val", "val", "accuracy"),
    UnderstandingBenchmark("MMVet", 73.0, "MMVet", "mmvet", "test", "judged, 0 to 1", "GPT-4, always"),
    UnderstandingBenchmark("ChartQA", 88.0, "ChartQA_TEST", "chartqa", "test", "relaxed accuracy"),
    UnderstandingBenchmark("DocVQA", 95.9, "DocVQA_VAL", "docvqa_val", "val", "ANLS"),
    UnderstandingBenchmark("TextVQA", 79.5, "TextVQA_VAL", "textvqa_val", "val", "VQA accuracy"),
    UnderstandingBenchmark("InfoVQA", 77.7, "InfoVQA_VAL", "infovqa_val", "val", "ANLS"),
    UnderstandingBenchmark("OCRBench", 89.0, "OCRBench", "ocrbench", "test", "answers that hold the text, of 1,000"),
    UnderstandingBenchmark(
        "MathVista", 75.8, "MathVista_MINI", "mathvista_testmini", "testmini", "accuracy", "GPT-4, extracts answers"
    ),
    UnderstandingBenchmark("AI2D", 83.9, "AI2D_TEST", "ai2d", "test", "accuracy"),
    UnderstandingBenchmark("MMStar", 64.8, "MMStar", "mmstar", "val", "accuracy"),
)
"""DocVQA and InfoVQA have answers for their validation splits only; the paper does not say which it took."""


def mean_score(scores: Mapping[str, float]) -> float:
    """The paper's mean over the eleven, in per cent. Raises ValueError where one is missing: a mean over fewer is no
    comparison."""
    missing = [benchmark.name for benchmark in UNDERSTANDING if benchmark.name not in scores]
    if missing:
        raise ValueError(f"no score of {', '.join(missing)}")
    return sum(scores[benchmark.name] for benchmark in UNDERSTANDING) / len(UNDERSTANDING)
