"""`report`: one HTML page for a run folder, or for a pipeline's folder with one run folder per stage below it.

The page holds everything (style, charts, images) and loads nothing, so that it can be mailed or archived. Whatever is
missing or torn in the folder, a page comes out, and it says what is not there.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from emma_train.errors import UserError
from emma_train.monitor.progress import duration, si
from emma_train.monitor.trackers import read_jsonl
from emma_train.report.charts import (
    Axis,
    Band,
    Chart,
    Series,
    line_chart,
    number,
    reaches,
    smoothed,
    sparkline,
    time_bar,
)
from emma_train.report.gallery import Moment, as_number, read_moments, samples_html, scores_html
from emma_train.report.page import page, section

TASKS = (
    ("i2t", "understanding (i2t)", "c-blue"),
    ("t2i", "generation (t2i)", "c-red"),
    ("it2i", "editing (it2i)", "c-green"),
)


@dataclass
class Stage:
    """One run folder, read. records: metrics in the order of steps, one per step. config: text of config.yaml."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: str
    scores: list[dict[str, Any]]
    moments: list[Moment] = field(default_factory=list)

    @property
    def label(self) -> str:
        """ "stage4_expert" -> "Stage 4 · expert"."""
        match = re.fullmatch(r"stage(\d+)_?(.*)", self.name)
        if not match:
            return self.name.replace("_", " ")
        return f"Stage {match[1]}" + (f" · {match[2].replace('_', ' ')}" if match[2] else "")

    @property
    def short(self) -> str:
        """ "stage2_phase3" -> "S2p3"."""
        match = re.fullmatch(r"stage(\d+)_?(.*)", self.name)
        if not match:
            return self.name[:3]
        return f"S{match[1]}" + match[2][:1] + "".join(c for c in match[2] if c.isdigit())

    @property
    def steps(self) -> int:
        """The steps that the stage took: the last one logged, or as its summary says."""
        told = as_number(self.summary.get("steps"))
        return int(max([self.records[-1]["step"] if self.records else 0, told or 0]))

    @property
    def seconds(self) -> float | None:
        """Time in training: as the summary says, else between the first and the last record."""
        told = as_number(self.summary.get("seconds"))
        times = [t for t in (as_number(r.get("time_unix")) for r in self.records) if t is not None]
        return told if told is not None else (times[-1] - times[0] if len(times) > 1 else None)

    def values(self, key: str) -> np.ndarray:
        """A metric, (num_records,), NaN where it is absent or not a number."""
        found = (as_number(record.get(key)) for record in self.records)
        return np.array([math.nan if v is None or not math.isfinite(v) else v for v in found], dtype=float)


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder or a pipeline's folder and returns its path.

    Raises UserError where the folder is not there.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a folder; give a run folder such as runs/NAME")
    path = run / "report.html"
    beside = path.with_name("report.html.tmp")
    beside.write_text(render(run), encoding="utf-8")
    os.replace(beside, path)
    return path


def render(run: Path) -> str:
    """The page of a run folder as text."""
    missing: list[str] = []
    stages = [_read_stage(folder, missing) for folder in stage_folders(run)]
    own = [] if [s.folder for s in stages] == [run] else _read_scores(run, missing)
    scores = own + [score for stage in stages for score in stage.scores]
    environment = _read_json(run / "environment.json") or next((s.environment for s in stages if s.environment), {})
    moments = [moment for stage in stages for moment in stage.moments]
    axis = _axis(stages)
    charts: list[Chart] = []
    if not stages:
        missing.append("no stage was found: neither metrics.jsonl nor config.yaml is here or one folder below")
    if not moments:
        missing.append("no sample images: samples/step-*/samples.json is not there")
    if not scores:
        missing.append("no scores: scores.json is not there")

    body = _header(run, stages, scores, environment)
    if stages:
        body += section(
            "stages",
            "Stages",
            "What each stage trained, and its loss from first to last step, smoothed.",
            _tiles(stages),
        )
    if scores:
        body += section("scores", "Scores", "Measured after training, on the named split.", scores_html(scores))
    if moments:
        note = (
            "The same prompts while the model learns. Of its answers, those that differ from the one before are shown."
        )
        body += section("samples", "What it makes and says", note, samples_html(moments))
    losses = _loss_charts(axis, stages)
    if losses:
        charts += losses
        note = "Steps are counted through the whole run. Light lines are single steps, bold ones a centred average."
        body += section("losses", "Losses", note, _alarms(stages) + "".join(chart.html for chart in losses))
    machine = _machine_charts(axis, stages)
    times = _times(stages)
    if machine or times:
        charts += machine
        grid = f'<div class="charts">{"".join(chart.html for chart in machine)}</div>' if machine else ""
        body += section("machine", "Optimizer and machine", "How it was driven, and where the time went.", times + grid)
    body += _files(stages, environment)
    if missing:
        items = "".join(f"<li>{escape(line)}</li>" for line in missing)
        body += section(
            "missing",
            "Not in this report",
            "What the run folder lacks.",
            f'<div class="card"><ul class="missing">{items}</ul></div>',
        )
    body += "<footer>Written by <code>emma-train report</code>. This file is whole and loads nothing.</footer>"

    hover = axis.hover()
    data = {
        "x": axis.x[hover].tolist(),
        "step": axis.step[hover].astype(int).tolist(),
        "stage": axis.band[hover].astype(int).tolist(),
        "stages": [band.label for band in axis.bands],
        "end": axis.end,
        "charts": {chart.key: chart.hover for chart in charts},
    }
    return page(f"{run.resolve().name} · EMMA training report", body, data)


def stage_folders(run: Path) -> list[Path]:
    """The run folder itself, or the stages' folders below it, in the order of their names, which is the recipe's."""
    if (run / "metrics.jsonl").exists():
        return [run]
    below = [
        f
        for f in run.iterdir()
        if f.is_dir() and any((f / n).exists() for n in ("metrics.jsonl", "config.yaml", "summary.json"))
    ]
    if not below and (run / "config.yaml").exists():
        return [run]
    return sorted(below, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name)])


def find(data: Any, names: tuple[str, ...]) -> Any:
    """The first value under one of the names, in their order, anywhere in nested dictionaries; else None."""
    for name in names:
        for key, value in _walk(data):
            if key == name and value not in (None, "", {}, []):
                return value
    return None


def _walk(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key), value
            yield from _walk(value)


def _read_stage(folder: Path, missing: list[str]) -> Stage:
    records: list[dict[str, Any]] = []
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        # By step: after a resume the later record of a step counts.
        by_step = {r["step"]: r for r in read_jsonl(metrics) if as_number(r.get("step")) is not None}
        records = [by_step[step] for step in sorted(by_step)]
    if not records:
        missing.append(f"{folder.name}: metrics.jsonl is missing or empty")
    texts = {}
    for name in ("config.yaml", "environment.json", "summary.json"):
        if not (folder / name).exists():
            missing.append(f"{folder.name}: {name} is missing")
    try:
        texts["config"] = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        texts["config"] = ""
    summary = _read_json(folder / "summary.json")
    named = next((r["stage"] for r in records if isinstance(r.get("stage"), str)), None)
    name = folder.name if re.match(r"stage\d", folder.name) else str(summary.get("stage") or named or folder.name)
    stage = Stage(
        name,
        folder,
        records,
        summary,
        _read_json(folder / "environment.json"),
        texts["config"],
        _read_scores(folder, missing),
    )
    stage.moments = read_moments(stage.label, stage.short, folder, missing)
    return stage


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _read_scores(folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    path = folder / "scores.json"
    if not path.exists():
        return []
    scores = _read_json(path).get("scores")
    if not isinstance(scores, list):
        missing.append(f"{folder.name}: scores.json has no list named scores")
        return []
    return [score for score in scores if isinstance(score, dict)]


def _axis(stages: list[Stage]) -> Axis:
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


def _across(stages: list[Stage], key: str) -> np.ndarray:
    return np.concatenate([stage.values(key) for stage in stages]) if stages else np.zeros(0)


def _ends(stage: Stage) -> tuple[float, float] | None:
    """The smoothed loss at the first and at the last step."""
    y = _smooth_loss(stage)
    y = y[np.isfinite(y)]
    return (float(y[0]), float(y[-1])) if len(y) else None


def _smooth_loss(stage: Stage) -> np.ndarray:
    return smoothed(_axis([stage]), stage.values("loss"))


def _header(run: Path, stages: list[Stage], scores: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    seconds = [s.seconds for s in stages if s.seconds is not None]
    took = duration(sum(seconds)) if seconds else "not recorded"
    steps = sum(stage.steps for stage in stages)
    if len(stages) > 1:
        lead = f"<b>{len(stages)} stages</b>, one after another: <b>{steps:,} steps</b> in <b>{took}</b>."
    elif stages:
        ends = _ends(stages[0])
        fell = f" Its loss went from <b>{number(ends[0])}</b> to <b>{number(ends[1])}</b>." if ends else ""
        lead = f"{escape(stages[0].label)}: <b>{steps:,} steps</b> in <b>{took}</b>.{fell}"
    else:
        lead = "Nothing was trained in this folder yet."
    barred = [(as_number(s.get("value")), as_number(s.get("bar")), s.get("higher_is_better", True)) for s in scores]
    met = [v is not None and reaches(v, bar, up is not False) for v, bar, up in barred if bar is not None]
    if met:
        lead += f" <b>{sum(met)} of {len(met)}</b> scores reach their bar."
    times = [t for s in stages for t in (as_number(r.get("time_unix")) for r in s.records) if t is not None]
    when = datetime.fromtimestamp(times[-1], UTC).strftime("%-d %b %Y, %H:%M UTC") if times else None
    parameters = next((p for p in (as_number(s.summary.get("parameters")) for s in reversed(stages)) if p), None)
    commit = find(environment, ("commit", "git_commit", "sha"))
    world = find(environment, ("world_size", "num_processes", "processes"))
    facts = [
        ("Finished" if when else "Date", when),
        ("Duration", took),
        ("Parameters", si(parameters) if parameters else None),
        ("Processes", world),
        ("Commit", str(commit)[:12] if commit else None),
        ("Hardware", find(environment, ("hardware", "gpu", "device", "device_name", "cpu", "machine", "platform"))),
    ]
    rows = "".join(
        f"<div{' class=wide' if len(_words(value)) > 24 else ''}><dt>{name}</dt><dd>{escape(_words(value))}</dd></div>"
        for name, value in facts
    )
    return (
        f'<header><p class="kicker">EMMA training report</p><h1>{escape(run.resolve().name)}</h1>'
        f'<p class="lead">{lead}</p><dl class="facts">{rows}</dl></header>'
    )


def _words(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return ", ".join(f"{str(k).replace('_', ' ')} {_words(v)}" for k, v in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _tiles(stages: list[Stage]) -> str:
    tiles = []
    for stage in stages:
        ends = _ends(stage)
        big = f"{number(ends[0])}<span>→</span>{number(ends[1])}" if ends else "no loss logged"
        groups = stage.summary.get("trainable")
        if isinstance(groups, dict):
            parts = [
                f"<li>{escape(str(k).replace('_', ' '))} <span>{si(as_number(n) or 0)}</span></li>"
                for k, n in groups.items()
            ]
            chips = f'<ul class="chips" aria-label="trained parts">{"".join(parts)}</ul>'
        else:
            chips = '<p class="plain">trained parts not recorded</p>'
        frozen = stage.summary.get("frozen_verified")
        seal = ""
        if isinstance(frozen, bool):
            seal = (
                '<span class="ok">✓ frozen parts unchanged</span>'
                if frozen
                else '<span class="bad">✗ frozen parts changed</span>'
            )
        trained, total = (
            as_number(stage.summary.get("trainable_parameters")),
            as_number(stage.summary.get("parameters")),
        )
        share = f'<p class="plain">trains {si(trained)} of {si(total)}</p>' if trained is not None and total else ""
        tiles.append(
            f'<div class="tile"><h3>{escape(stage.label)}</h3>'
            f"<small>{stage.steps:,} steps · {duration(stage.seconds)}</small>"
            f'{sparkline(_smooth_loss(stage), "c-blue")}<div class="big">{big}</div>'
            f'{share}{chips}<p class="seal">{seal}</p></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _alarms(stages: list[Stage]) -> str:
    """Says where a loss was not finite."""
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


def _loss_charts(axis: Axis, stages: list[Stage]) -> list[Chart]:
    total = [Series("loss", "c-ink", _across(stages, "loss"))]
    tasks = [Series(title, color, _across(stages, f"loss/{task}")) for task, title, color in TASKS]
    note = "The weighted sum that is optimised. Its parts change from stage to stage."
    by_task = "Cross-entropy of the answer's tokens (i2t); error of the velocity (t2i, it2i)."
    charts = [
        line_chart(axis, "loss", "Total loss", note, total, smooth=True, log_switch=True, tall=True),
        line_chart(axis, "tasks", "Loss by task", by_task, tasks, smooth=True, log_switch=True, tall=True),
    ]
    return [chart for chart in charts if chart]


def _machine_charts(axis: Axis, stages: list[Stage]) -> list[Chart]:
    def one(key: str, color: str = "c-blue", name: str = "", scale: float = 1.0) -> list[Series]:
        return [Series(name or key, color, _across(stages, key) * scale)]

    padding, tokens = _across(stages, "tokens/padding"), _across(stages, "tokens/total")
    with np.errstate(divide="ignore", invalid="ignore"):
        wasted = [Series("padding", "c-blue", 100 * padding / tokens)]
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
        line_chart(axis, "padding", "Padding", "Percent of all tokens", wasted, smooth=True, from_zero=True),
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


def time_split(stage: Stage) -> tuple[float, float, float] | None:
    """Seconds of a stage in computing, in waiting for data and in checkpoints; None where no step time was logged.

    `step_s` holds the wait for data; a checkpoint's stall comes after it. Where only some steps are logged, each stands
    for those since the one before, but for stalls, which belong to their own step.
    """
    step, wait, stall = (np.nan_to_num(stage.values(key)) for key in ("step_s", "data/wait_s", "checkpoint/stall_s"))
    if not step.any():
        return None
    weight = np.diff([0.0, *(record["step"] for record in stage.records)])
    waited = float(weight @ wait)
    return max(0.0, float(weight @ step) - waited), waited, float(stall.sum())


def _times(stages: list[Stage]) -> str:
    """Where each stage's step time went: a stacked bar per stage."""
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


def _files(stages: list[Stage], environment: dict[str, Any]) -> str:
    blocks = [(f"Config of {stage.label}", stage.config) for stage in stages if stage.config]
    if environment:
        blocks.append(("Environment", json.dumps(environment, indent=2, ensure_ascii=False)))
    if not blocks:
        return ""
    body = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in blocks
    )
    return section("files", "Config and environment", "As resolved before step 0.", f"<div>{body}</div>")
