"""The head of a report and a tile for each stage."""

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from emma_train.monitor.progress import duration, si
from emma_train.monitor.run_state import RunState, read_run_state
from emma_train.report.charts import sparkline
from emma_train.report.metrics import loss_ends, smoothed_loss
from emma_train.report.numbers import as_number, short_number
from emma_train.report.scores import reaches
from emma_train.report.stage_run import StageRun
from emma_train.report.times import goodput_of


def header_html(run: Path, stages: list[StageRun], scores: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """Title, one sentence on the outcome, and a table of facts."""
    seconds = [s.seconds for s in stages if s.seconds is not None]
    took = duration(sum(seconds)) if seconds else "not recorded"
    states = [read_run_state(stage.folder) for stage in stages]
    done, planned = sum(s.steps for s in stages), sum(state.steps or 0 for state in states)
    steps = f"{done:,} of {planned:,} steps" if planned > done else f"{done:,} steps"
    if len(stages) > 1:
        lead = f"<b>{len(stages)} stages</b>, one after another: <b>{steps}</b> in <b>{took}</b>."
    elif stages:
        ends = loss_ends(stages[0])
        fell = f" Its loss went from <b>{short_number(ends[0])}</b> to <b>{short_number(ends[1])}</b>." if ends else ""
        lead = f"{escape(stages[0].label)}: <b>{steps}</b> in <b>{took}</b>.{fell}"
    else:
        lead = "Nothing was trained in this folder yet."
    barred = [(as_number(s.get("value")), as_number(s.get("bar")), s.get("higher_is_better", True)) for s in scores]
    met = [v is not None and reaches(v, bar, up is not False) for v, bar, up in barred if bar is not None]
    if met:
        lead += f" <b>{sum(met)} of {len(met)}</b> scores reach their bar."
    times = [t for s in stages for t in (as_number(r.get("time_unix")) for r in s.records) if t is not None]
    when = datetime.fromtimestamp(times[-1], UTC).strftime("%-d %b %Y, %H:%M UTC") if times else None
    parameters = next((p for p in (as_number(s.summary.get("parameters")) for s in reversed(stages)) if p), None)
    facts = [
        ("State", state_of_all(states)),
        ("Last step", when),
        ("Duration", took),
        *([("Goodput", goodput)] if (goodput := goodput_of([stage.ledger for stage in stages])) else []),
        ("Parameters", si(parameters) if parameters else None),
        ("Processes", world_sizes(states) or environment.get("world_size")),
        ("Commit", environment.get("commit")),
        ("Hardware", environment.get("device")),
    ]
    rows = "".join(_fact(name, "not recorded" if value is None else str(value)) for name, value in facts)
    return (
        f'<header><p class="overline">EMMA training report</p><h1>{escape(run.resolve().name)}</h1>'
        f'<p class="lead">{lead}</p><dl class="facts">{rows}</dl></header>'
    )


def state_of_all(states: list[RunState]) -> str | None:
    """That of the newest stage which is not done, and done where all are."""
    open_ones = [
        f"{state.state}, {state.name}" if len(states) > 1 else state.state for state in states if state.state != "done"
    ]
    return open_ones[-1] if open_ones else "done" if states else None


def world_sizes(states: list[RunState]) -> str:
    """Ranks of all starts in order, each named where it changes: "8, 4, 8 (5 starts)"."""
    sizes = [size for state in states for size in state.world_sizes]
    changes = [size for before, size in zip([None, *sizes], sizes, strict=False) if size != before]
    text = ", ".join(str(size) for size in changes)
    return f"{text} ({len(sizes)} starts)" if len(sizes) > len(states) else text


def _fact(name: str, value: str) -> str:
    kind = " class=wide" if len(value) > 24 else ""
    return f"<div{kind}><dt>{name}</dt><dd>{escape(value)}</dd></div>"


def tiles_html(stages: list[StageRun]) -> str:
    """A tile for each stage: its loss, what it trained, and whether the frozen part stayed as it was."""
    tiles = []
    for stage in stages:
        ends = loss_ends(stage)
        big = f"{short_number(ends[0])}<span>→</span>{short_number(ends[1])}" if ends else "no loss logged"
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
        verdict = ""
        if isinstance(frozen, bool):
            verdict = (
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
            f'{sparkline(smoothed_loss(stage), "c-blue")}<div class="big">{big}</div>'
            f'{share}{chips}<p class="frozen-check">{verdict}</p></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'
