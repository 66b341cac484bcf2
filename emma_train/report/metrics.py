"""Metrics of a run as charts: losses, optimizer, speed, memory."""

import math
from collections.abc import Iterator
from html import escape

import numpy as np

from emma_train.report.charts import Axis, Band, Chart, Series, StartMark, line_chart, smoothed
from emma_train.report.stage_run import StageRun
from emma_train.sequence.tasks import TASKS, tasks_of_loss

SOURCE_COLORS = ("c-blue", "c-red", "c-green", "c-pink", "c-gold", "c-ink")
"""Of the sources of a task, in the order of their names."""


def run_axis(stages: list[StageRun]) -> Axis:
    """The x axis of all charts: steps counted through all stages."""
    x: list[float] = []
    step: list[float] = []
    band: list[int] = []
    bands: list[Band] = []
    marks: list[StartMark] = []
    offset = 0.0
    for stage in stages:
        for record in stage.records:
            x.append(offset + record["step"])
            step.append(record["step"])
            band.append(len(bands))
        marks += [StartMark(offset + step, size) for step, size in stage.starts]
        bands.append(Band(stage.label, stage.short, offset, offset + stage.steps))
        offset += stage.steps
    return Axis(np.array(x, dtype=float), np.array(step, dtype=float), np.array(band, dtype=int), bands, marks)


def _across(stages: list[StageRun], key: str) -> np.ndarray:
    return np.concatenate([stage.values(key) for stage in stages]) if stages else np.zeros(0)


def loss_ends(stage: StageRun) -> tuple[float, float] | None:
    """The smoothed loss at the first and at the last step; None where no loss was logged."""
    y = smoothed_loss(stage)
    y = y[np.isfinite(y)]
    return (float(y[0]), float(y[-1])) if len(y) else None


def smoothed_loss(stage: StageRun) -> np.ndarray:
    return smoothed(run_axis([stage]), stage.values("loss"))


def loss_warning(stages: list[StageRun]) -> str:
    """A note with the steps whose loss was not finite; empty if all were."""
    steps = [
        f"{stage.label} step {record['step']:,}"
        for stage in stages
        for record, loss in zip(stage.records, stage.values("loss"), strict=True)
        if "loss" in record and math.isnan(loss)
    ]
    if not steps:
        return ""
    more = f" and {len(steps) - 6} more" if len(steps) > 6 else ""
    return f'<p class="note alarm">The loss was not finite at {escape(", ".join(steps[:6]))}{more}.</p>'


def loss_charts(axis: Axis, stages: list[StageRun]) -> list[Chart]:
    """Charts of the total loss, of the loss of each task, and of the sources of a task that has several."""
    total = [Series("loss", "c-ink", _across(stages, "loss"))]
    tasks = [Series(task.title, task.color, _across(stages, f"loss/{task.name}")) for task in TASKS.values()]
    note = "The weighted sum that is optimised. Its parts change from stage to stage."
    text, flow = (", ".join(tasks_of_loss(loss)) for loss in ("text", "flow"))
    by_task = f"Cross-entropy of the answer's tokens ({text}); error of the velocity ({flow})."
    charts = [
        line_chart(axis, "loss", "Total loss", note, total, smooth=True, log_switch=True, tall=True),
        line_chart(axis, "tasks", "Loss by task", by_task, tasks, smooth=True, log_switch=True, tall=True),
    ]
    return [chart for chart in [*charts, *_source_charts(axis, stages)] if chart]


def _source_charts(axis: Axis, stages: list[StageRun]) -> Iterator[Chart | None]:
    """A chart for each task with several sources; the first sources by name, where there are many."""
    for task in TASKS.values():
        prefix = f"loss/{task.name}/"
        keys = sorted({key for stage in stages for record in stage.records for key in record if key.startswith(prefix)})
        if len(keys) < 2:
            continue
        shown = zip(keys, SOURCE_COLORS, strict=False)
        series = [Series(key.removeprefix(prefix), color, _across(stages, key)) for key, color in shown]
        more = (
            f" The first {len(SOURCE_COLORS)} of {len(keys)} sources by name." if len(keys) > len(SOURCE_COLORS) else ""
        )
        title = f"Loss by source: {task.title}"
        note = f"In the steps that logged it.{more}"
        yield line_chart(axis, f"sources-{task.name}", title, note, series, smooth=True, log_switch=True)


def machine_charts(axis: Axis, stages: list[StageRun]) -> list[Chart]:
    """Charts of the optimizer, of speed and of memory."""

    def one(key: str, color: str = "c-blue", name: str = "", scale: float = 1.0) -> list[Series]:
        return [Series(name or key, color, _across(stages, key) * scale)]

    waits = one("data/wait_s", "c-red", "data wait") + one("checkpoint/stall_s", "c-gold", "checkpoint stall")
    charts = [
        line_chart(axis, "lr", "Learning rate", "Per step", one("lr")),
        line_chart(axis, "grad", "Gradient norm", "Before clipping", one("grad_norm"), smooth=True, log_switch=True),
        line_chart(
            axis,
            "speed",
            "Throughput",
            "Tokens per second, all processes",
            one("tokens_per_s", name="tokens/s"),
            smooth=True,
            from_zero=True,
        ),
        line_chart(
            axis,
            "time",
            "Step time",
            "Seconds with the wait for data; a checkpoint's stall comes on top",
            one("step_s", name="step") + waits,
            smooth=True,
            from_zero=True,
        ),
        line_chart(
            axis,
            "straggler",
            "Straggler",
            "Cost of the dearest pack over the mean; 1 is even",
            one("data/straggler"),
            smooth=True,
        ),
        line_chart(axis, "memory", "Memory", "GiB per process", one("memory_gib"), from_zero=True),
        line_chart(
            axis, "mfu", "MFU", "Percent of the dense bf16 peak", one("mfu", scale=100), smooth=True, from_zero=True
        ),
        line_chart(
            axis,
            "stem",
            "STEM expert",
            "Percent of images that take it: by label, then as the router would choose",
            one("vision/stem_share", scale=100),
            from_zero=True,
        ),
    ]
    return [chart for chart in charts if chart]
