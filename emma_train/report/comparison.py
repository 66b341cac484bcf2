"""One HTML page that compares runs: losses over steps, tokens and time, what differs in their configs, last samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emma_train.errors import UserError
from emma_train.monitor.progress import duration, si
from emma_train.monitor.run_state import read_run_state
from emma_train.report.charts import Axis, Band, Chart, Series, line_chart
from emma_train.report.gallery import SampleSnapshot, samples_html
from emma_train.report.numbers import short_number
from emma_train.report.overview import state_of_all, world_sizes
from emma_train.report.page import html_page, html_section
from emma_train.report.stage_run import StageRun, read_stage_run, stage_folders
from emma_train.storage.files import write_atomic

COLORS = ("c-blue", "c-red", "c-green", "c-pink", "c-gold", "c-ink")
NUM_POINTS = 400
"""Points of a line: runs log at other steps, so each is read off at the same positions."""
WITHOUT_MEANING = ("run", "init")
"""Sections that differ between any two runs."""


@dataclass(frozen=True)
class Compared:
    """One of the runs: its name, and its stages in order."""

    name: str
    stages: list[StageRun]

    def values(self, key: str) -> np.ndarray:
        """A metric over all stages: (num_records,), NaN where it is absent."""
        return np.concatenate([stage.values(key) for stage in self.stages])

    def steps(self) -> np.ndarray:
        """Steps done at each record, counted through all stages."""
        offsets = np.cumsum([0, *(stage.steps for stage in self.stages[:-1])])
        return np.concatenate([stage.values("step") + o for stage, o in zip(self.stages, offsets, strict=True)])

    def accumulated(self, key: str) -> np.ndarray:
        """The sum of a metric of every step up to each record; steps between records count as the later one's."""
        values = np.nan_to_num(self.values(key))
        return np.cumsum(values * np.diff(self.steps(), prepend=0.0))


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path. Raises UserError where a folder holds no run, or there are too many."""
    if len(runs) > len(COLORS):
        raise UserError(f"report: {len(runs)} runs are too many for one chart; compare at most {len(COLORS)}")
    page = render_comparison([read_compared(run) for run in runs])
    try:
        write_atomic(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return out


def read_compared(run: Path) -> Compared:
    """A run by its folder. Raises UserError where it holds none."""
    stages = [read_stage_run(folder, []) for folder in stage_folders(run)] if run.is_dir() else []
    if not any(stage.records for stage in stages):
        raise UserError(f"{run} holds no run with metrics; give a run folder such as runs/NAME")
    return Compared(str(run), stages)


def render_comparison(runs: Sequence[Compared]) -> str:
    """The page as HTML."""
    charts = [*loss_charts_of(runs), *machine_charts_of(runs)]
    steps_axis = _axis(max(run.steps()[-1] for run in runs))
    hover = steps_axis.hover()
    data = {
        "x": steps_axis.x[hover].tolist(),
        "step": steps_axis.x[hover].round().astype(int).tolist(),
        "stage": [0] * len(hover),
        "stages": ["All runs"],
        "end": steps_axis.end,
        "charts": {chart.key: chart.hover for chart in charts if chart.hover},
    }
    body = "".join(
        (
            '<header><p class="overline">EMMA training report</p><h1>Comparison of runs</h1></header>',
            html_section("runs", "Runs", "As of the last step that each has logged.", _runs_table(runs)),
            html_section("charts", "Losses and speed", "The same colours throughout.", "".join(c.html for c in charts)),
            html_section("config", "What differs in the configs", "", _differences_table(runs)),
            _samples_section(runs),
            "<footer>Written by <code>emma-train report</code>. This file is whole and loads nothing.</footer>",
        )
    )
    return html_page("Comparison of runs · EMMA training report", body, data)


def loss_charts_of(runs: Sequence[Compared]) -> list[Chart]:
    """The total loss over steps, tokens and hours of training."""
    kinds = {
        "steps": [run.steps() for run in runs],
        "tokens": [run.accumulated("tokens/total") for run in runs],
        "hours": [run.accumulated("step_s") / 3600 for run in runs],
    }
    charts = []
    for name, positions in kinds.items():
        axis = _axis(max(float(position[-1]) for position in positions))
        series = _series(runs, positions, "loss", axis)
        title = f"Loss over {name}"
        chart = line_chart(
            axis, name, title, "The weighted sum that is optimised", series, smooth=True, log_switch=True
        )
        if chart is not None:
            # The page's script knows the steps of one axis alone.
            still = replace(chart, hover=[], html=chart.html.replace('<i class="cursor"></i>', ""))
            charts.append(chart if name == "steps" else still)
    return charts


def machine_charts_of(runs: Sequence[Compared]) -> list[Chart]:
    """Speed and gradient norm over steps."""
    positions = [run.steps() for run in runs]
    axis = _axis(max(float(position[-1]) for position in positions))
    charts = [
        line_chart(axis, key, title, note, _series(runs, positions, key, axis), smooth=True)
        for key, title, note in (
            ("tokens_per_s", "Throughput", "Tokens per second, all processes"),
            ("grad_norm", "Gradient norm", "Before clipping"),
        )
    ]
    return [chart for chart in charts if chart is not None]


def config_differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Dotted keys of config.yaml whose values are not the same in all runs: by key, the value of each run. Of a run of
    several stages, the last one counts."""
    configs = [_flat(_config(run.stages[-1])) for run in runs]
    keys = sorted({key for config in configs for key in config})
    shown = {key: [config.get(key, "–") for config in configs] for key in keys}
    return {k: v for k, v in shown.items() if len(set(v)) > 1 and k.split(".")[0] not in WITHOUT_MEANING}


def _config(stage: StageRun) -> dict[str, Any]:
    try:
        config = yaml.safe_load(stage.config)
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": str(value)}
    return flat


def _axis(end: float) -> Axis:
    x = np.linspace(0, end, NUM_POINTS)
    return Axis(x, x, np.zeros(NUM_POINTS, dtype=int), [Band("", "", 0.0, end)])


def _series(runs: Sequence[Compared], positions: Sequence[np.ndarray], key: str, axis: Axis) -> list[Series]:
    """A line for each run, between its first and its last record."""
    lines = []
    for run, position, color in zip(runs, positions, COLORS, strict=False):
        y = run.values(key)
        known = np.isfinite(y)
        if known.any():
            values = np.interp(axis.x, position[known], y[known], left=np.nan, right=np.nan)
            lines.append(Series(run.name, color, values))
    return lines


def _runs_table(runs: Sequence[Compared]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("run", "state", "steps", "tokens", "time", "loss", "ranks"))
    rows = ""
    for run in runs:
        states = [read_run_state(stage.folder) for stage in run.stages]
        losses = run.values("loss")
        losses = losses[np.isfinite(losses)]
        seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
        cells = (
            run.name,
            state_of_all(states) or "",
            f"{sum(stage.steps for stage in run.stages):,}",
            si(float(run.accumulated("tokens/total")[-1])),
            duration(sum(seconds)) if seconds else "",
            short_number(float(losses[-1])) if len(losses) else "",
            world_sizes(states),
        )
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return f'<div class="card image-grid"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _differences_table(runs: Sequence[Compared]) -> str:
    differences = config_differences(runs)
    if not differences:
        return "<p>Nothing.</p>"
    head = "<th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>' + "".join(f"<td>{escape(value)}</td>" for value in values) + "</tr>"
        for key, values in differences.items()
    )
    return f'<div class="card image-grid"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _samples_section(runs: Sequence[Compared]) -> str:
    """The last samples of each run, a column a run; with images, if it made some in any stage."""
    last: list[SampleSnapshot] = []
    for run in runs:
        snapshots = [snapshot for stage in run.stages for snapshot in stage.snapshots]
        drawn = [s for s in snapshots if any(sample.get("file") for sample in s.samples)] or snapshots
        last += [replace(snapshot, label=run.name, short=run.name) for snapshot in drawn[-1:]]
    if not last:
        return ""
    return html_section("samples", "What they make and say", "The last samples of each run.", samples_html(last))
