"""Validation in a report: held-out losses, right answers, and where understanding was forgotten."""

from collections.abc import Iterator
from html import escape

import numpy as np

from emma_train.report.charts import Axis, Chart, Series, line_chart
from emma_train.report.stage_run import StageRun
from emma_train.sequence.tasks import TASKS


def validation_charts(axis: Axis, stages: list[StageRun]) -> list[Chart]:
    """Charts of the losses of the weights and of the averaged weights, and of the right answers."""

    def across(key: str) -> np.ndarray:
        return np.concatenate([stage.values(key) for stage in stages]) if stages else np.zeros(0)

    def by_task(prefix: str) -> Iterator[Series]:
        for task in TASKS.values():
            yield Series(task.title, task.color, across(f"{prefix}loss/{task.name}"))
            yield Series(f"copied source ({task.name})", "c-gold", across(f"val/copy/{task.name}"))

    answers = [
        Series("averaged weights", "c-ink", across("val/ema/answers") * 100),
        Series("weights", "c-blue", across("val/answers") * 100),
    ]
    same = "The same samples with the same noise every time."
    copied = "Copied source: what a model that changes nothing would lose."
    charts = [
        line_chart(axis, "val", "Held-out loss by task", f"{same} {copied}", list(by_task("val/")), log_switch=True),
        line_chart(axis, "val-ema", "The same, averaged weights", same, list(by_task("val/ema/")), log_switch=True),
        line_chart(axis, "answers", "Right answers", "Percent of the probe's questions", answers, from_zero=True),
    ]
    if not any(np.isfinite(across(f"val/ema/loss/{name}")).any() for name in TASKS):
        del charts[1]
    return [chart for chart in charts if chart]


def forgetting_warning(stages: list[StageRun]) -> str:
    """A note with the steps whose validation showed that understanding is forgotten; empty if none did."""
    steps = [
        f"{stage.label} step {record['step']:,}"
        for stage in stages
        for record, signs in zip(stage.records, stage.values("val/forgotten"), strict=True)
        if signs > 0
    ]
    if not steps:
        return ""
    more = f" and {len(steps) - 6} more" if len(steps) > 6 else ""
    return f'<p class="note alarm">Understanding had fallen at {escape(", ".join(steps[:6]))}{more}.</p>'
