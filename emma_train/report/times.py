"""Where the time of a run went, as bars: by its ledger, or for older runs by its metrics."""

from collections.abc import Sequence
from html import escape

from emma_train.monitor.goodput import Ledger
from emma_train.monitor.progress import duration
from emma_train.report.stage_run import StageRun

PARTS = (
    ("steps", "c-blue", ("steps",)),
    ("steps computed again", "c-pink", ("repeated",)),
    ("data wait", "c-red", ("data_wait",)),
    ("checkpoint stall", "c-gold", ("checkpoint",)),
    ("validation and samples", "c-green", ("validation", "samples")),
    ("start and compile", "c-ink", ("start", "first_step")),
    ("restart", "c-soft", ("restart",)),
    ("other", "c-hair", ("other",)),
)
"""Pieces of a bar: name, colour, and causes of the ledger."""
Piece = tuple[str, str, float]
"""Name, colour, seconds."""


def times_html(stages: Sequence[StageRun]) -> str:
    """A stacked bar for each stage: its time by cause. Empty where no times were recorded."""
    rows = [(stage.label, pieces) for stage in stages if (pieces := pieces_of(stage))]
    if not rows:
        return ""
    longest = max(sum(seconds for *_, seconds in pieces) for _, pieces in rows)
    bars = "".join(time_bar(label, pieces, longest) for label, pieces in rows)
    present = {name for _, pieces in rows for name, _, seconds in pieces if seconds > 0}
    legend = "".join(f'<li class="dot {color}">{name}</li>' for name, color, _ in PARTS if name in present)
    note = "All starts of each stage, from the beginning of the first to the last step"
    if any(stage.ledger is None for stage in stages):
        note = "Steps and checkpoints; of stages with a ledger all starts"
    return (
        f'<div class="card times"><figcaption><div><h3>Where the time went</h3><p>{note}</p></div>'
        f'<ul class="legend">{legend}</ul></figcaption>{bars}</div>'
    )


def pieces_of(stage: StageRun) -> list[Piece]:
    """The pieces of a stage's bar, which add up to `StageRun.seconds`; none where no step time was logged."""
    if stage.ledger is not None:
        seconds = stage.ledger.seconds
        return [(name, color, sum(seconds[cause] for cause in causes)) for name, color, causes in PARTS]
    if (split := stage.time_split()) is None:
        return []
    return [(name, color, s) for (name, color, _), s in zip((PARTS[0], *PARTS[2:4]), split, strict=True)]


def time_bar(label: str, pieces: Sequence[Piece], longest: float) -> str:
    """A stacked bar of seconds, as long as its share of `longest`; in words, what takes at least half a percent."""
    total = sum(seconds for *_, seconds in pieces)
    drawn = "".join(
        f'<b class="{color}" style="width:{100 * seconds / longest if longest else 0:.2f}%" '
        f'title="{escape(name)}: {seconds:.1f} s"></b>'
        for name, color, seconds in pieces
        if seconds > 0
    )
    shares = [f"{name} {s / total:.0%}" for name, _, s in pieces[1:] if total and s / total >= 0.005]
    words = ", ".join(shares or ["steps alone" if total else "no times"])
    return (
        f'<div class="timerow"><span>{escape(label)}</span><div class="split" role="img" '
        f'aria-label="{escape(f"{label}: {total:.0f} s, {words}")}">{drawn}</div>'
        f"<em>{duration(total)}<small>{escape(words)}</small></em></div>"
    )


def goodput_of(ledgers: Sequence[Ledger | None]) -> str | None:
    """Share of useful steps in the wall time of all stages; None where one has no ledger."""
    known = [ledger for ledger in ledgers if ledger is not None]
    wall_s = sum(ledger.wall_s for ledger in known)
    if len(known) < len(ledgers) or not wall_s:
        return None
    return f"{sum(ledger.seconds['steps'] for ledger in known) / wall_s:.1%}"
