"""What an evaluation asked a model, item by item, and shares of right items with their standard errors."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FEWEST = 5
"""Kinds of which a split has fewer items get no score."""


@dataclass
class EvaluationItem:
    """One question, prompt or edit, what came out, and which facts of it are right."""

    split: str
    task: str
    kind: str
    key: str
    prompt: str
    seed: int
    verdicts: dict[str, bool]
    """Metric -> whether the item is right by it."""
    output: str = ""
    """The answer, or what was read from the image."""
    truth: str = ""
    image: np.ndarray | None = None
    """The generated image, uint8 [H, W, 3]."""
    baseline: dict[str, bool] = field(default_factory=dict)
    """The same verdicts for a trivial output."""

    @property
    def cluster(self) -> str:
        """The record: items of one record share its images, so their errors are not independent."""
        return self.key.partition("/")[0]


def share_scores(items: Sequence[EvaluationItem], unit: str, label: str) -> list[dict[str, Any]]:
    """A score for each split, task, kind and metric. `label`: the first word of their names."""
    groups: dict[tuple[str, str, str], list[EvaluationItem]] = defaultdict(list)
    for item in items:
        groups[item.split, item.task, item.kind].append(item)
    scores = []
    for (split, task, kind), members in sorted(groups.items()):
        for metric in dict.fromkeys(metric for item in members for metric in item.verdicts):
            asked = [item for item in members if metric in item.verdicts]
            if len(asked) < FEWEST:
                continue
            values = [float(item.verdicts[metric]) for item in asked]
            trivial = [float(item.baseline.get(metric, False)) for item in asked]
            score = make_score(
                f"{label}: {kind}" if metric == "exact_match" else f"{label}, {kind}: {metric.replace('_', ' ')}",
                float(np.mean(values)),
                float(np.mean(trivial)),
                unit,
                len(asked),
                share_stderr(values, [item.cluster for item in asked]),
            )
            scores.append({**score, "split": split, "task": f"{task}_{kind}".replace(" ", "_"), "metric": metric})
    return scores


def make_score(name: str, value: float, baseline: float, unit: str, num: int, stderr: float) -> dict[str, Any]:
    """A score as `evaluate` writes it, without a value to reach (`bar`)."""
    numbers = {"value": value, "stderr": stderr, "baseline": baseline}
    return {"name": name, **numbers, "unit": unit, "num": num, "bar": None, "higher_is_better": True}


def cluster_stderr(values: Sequence[float], clusters: Iterable[Hashable]) -> float:
    """Standard error of the mean of values that are independent between clusters only; 0 for a single cluster.

    For clusters of one value it is that of independent values, sd / sqrt(n).
    """
    deviations: dict[Hashable, float] = defaultdict(float)
    mean = float(np.mean(values))
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster] += value - mean
    num = len(deviations)
    return math.sqrt(sum(d * d for d in deviations.values()) * num / max(num - 1, 1)) / len(values)


def share_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a share; where all or none are right, 1 / (clusters + 1), as far as Wilson's interval of one
    standard error reaches."""
    if 0 < sum(values) < len(values):
        return cluster_stderr(values, clusters)
    return 1 / (len(set(clusters)) + 1)
