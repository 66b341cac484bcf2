"""Metrics of a run as charts: losses, optimizer, speed, memory, and where the time went."""

import math
from html import escape

import numpy as np

from emma_train.report.charts import Axis, Band, Chart, Series, line_chart, smoothed, time_bar
from emma_train.report.stage_run import StageRun
from emma_train.sequence.tasks import TASKS, tasks_of_loss


def run_axis(stages: list[StageRun]) -> Axis:
    """The x axis of all charts: steps counted through all stages."""
    x: list[float] = []
    step: list[float] = []
    band: list[int] = []
    bands: list[Band] = []
    offset = 0.0
    for stage in stages:
        for record in stage.records:
            x.append(offset + record["step"])
            step.append(record["step"])
            band.append(len(bands))
        bands.append(Band(stage.label, stage.short, offset, offset + stage.steps))
        offset += stage.steps
    return Axis(np.array(x, dtype=float), np.array(step, dtype=float), np.array(band, dtype=int), bands)


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
    """Charts of the total loss and of the loss of each task."""
    total = [Series("loss", "c-ink", _across(stages, "loss"))]
    tasks = [Series(task.title, task.color, _across(stages, f"loss/{task.name}")) for task in TASKS.values()]
    note = "The weighted sum that is optimised. Its parts change from stage to stage."
    text, flow = (", ".join(tasks_of_loss(loss)) for loss in ("text", "flow"))
    by_task = f"Cross-entropy of the answer's tokens ({text}); error of the velocity ({flow})."
    charts = [
        line_chart(axis, "loss", "Total loss", note, total, smooth=True, log_switch=True, tall=True),
        line_chart(axis, "tasks", "Loss by task", by_task, tasks, smooth=True, log_switch=True, tall=True),
    ]
    return [chart for chart in charts if chart]


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


def time_split(stage: StageRun) -> tuple[float, float, float] | None:
    """Seconds of a stage spent in computing, waiting for data and checkpoints; None where no step time was logged.

    `step_s` includes the wait for data; the stall of a checkpoint comes on top. If only some steps are logged, a record
    counts for all steps since the record before; a stall counts once.
    """
    step, wait, stall = (np.nan_to_num(stage.values(key)) for key in ("step_s", "data/wait_s", "checkpoint/stall_s"))
    if not step.any():
        return None
    weight = np.diff([0.0, *(record["step"] for record in stage.records)])
    waited = float(weight @ wait)
    return max(0.0, float(weight @ step) - waited), waited, float(stall.sum())


def times_html(stages: list[StageRun]) -> str:
    """A stacked bar for each stage: its time in computing, waiting for data and checkpoints."""
    rows = [(stage.label, split) for stage in stages if (split := time_split(stage))]
    if not rows:
        return ""
    names = (("compute", "c-blue"), ("data wait", "c-red"), ("checkpoint stall", "c-gold"))
    longest = max(sum(parts) for _, parts in rows)
    bars = "".join(
        time_bar(label, [(n, c, s) for (n, c), s in zip(names, parts, strict=True)], longest) for label, parts in rows
    )
    legend = "".join(f'<li class="dot {color}">{name}</li>' for name, color in names)
    return (
        f'<div class="card times"><figcaption><div><h3>Where the time went</h3><p>Steps and checkpoints</p></div>'
        f'<ul class="legend">{legend}</ul></figcaption>{bars}</div>'
    )
