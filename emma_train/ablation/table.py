"""The table of an ablation: means, paired differences against the first arm with their standard errors, and costs.

Two runs of one seed see the same samples and noise, so what they share cancels in their difference. With n seeds the
standard error is that of n differences, and the smallest effect that the design could have seen is the one that a
two-sided t-test at 5 % finds four times in five: (t(0.975, n-1) + t(0.8, n-1)) standard errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from emma_train.ablation.results import TrialResult

DETECTABLE = {2: 14.08, 3: 5.36, 4: 4.16, 5: 3.72, 6: 3.49, 7: 3.35, 8: 3.26, 9: 3.19, 10: 3.15}
"""t(0.975, n-1) + t(0.8, n-1) by n, from tables of Student's t."""
MANY = 3.0
"""Used for more than ten seeds, where the exact value is between 2.8 and 3.1."""


@dataclass(frozen=True)
class Paired:
    """The differences between an arm and the first one, over the seeds that both have."""

    num: int
    mean: float
    """Of the arm itself, over these seeds."""
    difference: float
    stderr: float | None
    """None with one seed."""

    @property
    def detectable(self) -> float | None:
        """The smallest effect that the design could have seen; None too where all differences are equal, as where no
        arm has a right answer: that says nothing about chance."""
        return DETECTABLE.get(self.num, MANY) * self.stderr if self.stderr else None


def paired(arm: Mapping[int, float], first: Mapping[int, float]) -> Paired | None:
    """Compare values by seed; None where no seed has both."""
    seeds = sorted(arm.keys() & first.keys())
    if not seeds:
        return None
    differences = [arm[seed] - first[seed] for seed in seeds]
    stderr = stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return Paired(len(seeds), fmean(arm[seed] for seed in seeds), fmean(differences), stderr)


def results_of_metric(results: Sequence[TrialResult], arm: str, metric: str) -> dict[int, float]:
    """Values of a metric by seed."""
    return {r.seed: r.metrics[metric] for r in results if r.arm == arm and metric in r.metrics}


def ablation_table(question: str, arms: Sequence[str], metrics: Sequence[str], results: Sequence[TrialResult]) -> str:
    """Two tables as Markdown: quality beside cost, and what the design could have seen."""
    first = arms[0]
    shown = [name for name in metrics if any(name in result.metrics for result in results)]
    lines = [f"**{question}**", ""] if question else []
    columns = ["arm", "seeds", *shown, "parameters", "tokens", "FLOPs", "seconds"]
    lines += [
        f"Mean over seeds; in brackets the paired difference from `{first}` ± its standard error.",
        "",
        _table_row(columns),
        _table_row(["---"] * len(columns)),
    ]
    for arm in arms:
        of_arm = [result for result in results if result.arm == arm]
        if not of_arm:
            lines.append(_table_row([arm, "0", *[""] * (len(columns) - 2)]))
            continue
        cells = [_cell(results, arm, first, metric) for metric in shown]
        tokens, flops, seconds = (fmean(getattr(r, key) for r in of_arm) for key in ("tokens", "flops", "seconds"))
        cost = [f"{of_arm[0].parameters:,}", f"{tokens:,.0f}", f"{flops:.3g}", f"{seconds:,.0f}"]
        lines.append(_table_row([arm, str(len(of_arm)), *cells, *cost]))
    lines += ["", *_detectable_lines(arms, shown, results)]
    return "\n".join(lines) + "\n"


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(results: Sequence[TrialResult], arm: str, first: str, metric: str) -> str:
    values = results_of_metric(results, arm, metric)
    if not values:
        return "–"
    if arm == first or (pair := paired(values, results_of_metric(results, first, metric))) is None:
        return f"{fmean(values.values()):.4f}"
    stderr = "" if pair.stderr is None else f" ± {pair.stderr:.4f}"
    return f"{fmean(values.values()):.4f} ({pair.difference:+.4f}{stderr})"


def _detectable_lines(arms: Sequence[str], metrics: Sequence[str], results: Sequence[TrialResult]) -> list[str]:
    rows = []
    for arm in arms[1:]:
        pairs = [
            paired(results_of_metric(results, arm, metric), results_of_metric(results, arms[0], metric))
            for metric in metrics
        ]
        effects = [None if pair is None else pair.detectable for pair in pairs]
        if any(effect is not None for effect in effects):
            rows.append(f"| {arm} | {' | '.join('–' if e is None else f'{e:.4f}' for e in effects)} |")
    if not rows:
        return ["No standard errors, which need a metric of two seeds: no difference can be told from chance."]
    return [
        "The smallest difference that this design finds four times in five (two-sided t-test at 5 %):",
        "",
        f"| arm | {' | '.join(metrics)} |",
        "|---|" + "---|" * len(metrics),
        *rows,
    ]
