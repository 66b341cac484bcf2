"""Where the wall time of a run went, over all its starts, and the share of it that was useful: the goodput.

ledger.jsonl in the run folder only grows. Each start writes a line when its steps begin, with `begun_unix`, then lines
with the seconds that were measured since the line before (training/time_ledger.py). A process that is killed writes
nothing at its end: what comes after its last line counts as restart.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emma_train.monitor.trackers import read_jsonl

LEDGER_FILE = "ledger.jsonl"
MEASURED = ("step", "data_wait", "checkpoint", "validation", "samples")
"""What a line has the seconds of, under these names and _s."""
CAUSES = {
    "steps": "steps",
    "repeated": "steps computed again",
    "first_step": "compile and first step",
    "data_wait": "data wait",
    "checkpoint": "checkpoint stall",
    "validation": "validation",
    "samples": "sample images",
    "start": "start and load",
    "restart": "restart",
    "other": "other",
}
"""Causes by key, with the name that people read."""


@dataclass(frozen=True)
class Ledger:
    """The wall time of a run from the beginning of its first start to its last line."""

    seconds: dict[str, float]
    """By key of CAUSES; they add up to `wall_s`."""
    wall_s: float
    begun_unix: float
    num_starts: int

    @property
    def goodput(self) -> float:
        """Share of the wall time in steps that did not have to be computed again."""
        return self.seconds["steps"] / self.wall_s if self.wall_s > 0 else 0.0


@dataclass
class _Start:
    begun_unix: float
    time_unix: float
    """When its steps began."""
    step: int
    """The last step that was done before."""
    lines: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def end_unix(self) -> float:
        return max([self.time_unix, *(line["time_unix"] for line in self.lines)])


def read_ledger(folder: Path) -> Ledger | None:
    """The ledger of a run folder; None where it has none. Lines that are torn are left out."""
    path = folder / LEDGER_FILE
    return ledger_of(read_jsonl(path)) if path.is_file() else None


def ledger_of(lines: Sequence[Mapping[str, Any]]) -> Ledger | None:
    """The ledger of the lines of ledger.jsonl, in the order in which they were written; None without any start."""
    starts = _starts(lines)
    if not starts:
        return None
    seconds = dict.fromkeys(CAUSES, 0.0)
    kept_until = math.inf
    for start in reversed(starts):
        for cause, value in _seconds_of_start(start, kept_until).items():
            seconds[cause] += value
        kept_until = min(kept_until, start.step)
    for before, after in zip(starts, starts[1:], strict=False):
        seconds["restart"] += after.begun_unix - before.end_unix
    return Ledger(seconds, sum(seconds.values()), starts[0].begun_unix, len(starts))


def first_step_excess(first_s: float, steps_s: float, num_steps: int) -> float:
    """Seconds of a start's first step beyond the mean of its other steps, which took `steps_s` together: compilation,
    first allocations, the choice of kernels. 0 where no other step is known."""
    return max(0.0, first_s - steps_s / num_steps) if num_steps else 0.0


def _starts(lines: Iterable[Mapping[str, Any]]) -> list[_Start]:
    starts: list[_Start] = []
    for line in lines:
        if not all(_is_number(line.get(key)) for key in ("time_unix", "step")):
            continue
        if _is_number(line.get("begun_unix")):
            # A rewind starts the stage again in the same process, which began before; clocks of two hosts may differ.
            begun_unix = max([line["begun_unix"], *(start.end_unix for start in starts[-1:])])
            starts.append(_Start(begun_unix, line["time_unix"], line["step"]))
        elif starts:
            starts[-1].lines.append(line)
    return starts


def _seconds_of_start(start: _Start, kept_until: float) -> dict[str, float]:
    """Seconds by cause of one start; its steps after `kept_until` were computed again by a later one."""
    seconds = dict.fromkeys(CAUSES, 0.0)
    seconds["start"] = max(0.0, start.time_unix - start.begun_unix)
    step, time_unix = start.step, start.time_unix
    excess = _excess_of(start)
    for line in start.lines:
        measured = {name: float(line.get(f"{name}_s", 0.0)) for name in MEASURED}
        seconds["other"] += max(0.0, line["time_unix"] - time_unix - sum(measured.values()))
        steps_s = measured.pop("step") - excess
        seconds["first_step"] += excess
        num_steps = line["step"] - step
        num_lost = min(num_steps, max(0, line["step"] - kept_until))
        # Without a step that was done, it is one that ended in a rewind.
        lost_s = steps_s * num_lost / num_steps if num_steps > 0 else steps_s
        seconds["repeated"] += lost_s
        seconds["steps"] += steps_s - lost_s
        for name, value in measured.items():
            seconds[name] += value
        step, time_unix, excess = line["step"], line["time_unix"], 0.0
    return seconds


def _excess_of(start: _Start) -> float:
    """`first_step_excess` of a start, whose first line is about its first step alone."""
    if not start.lines or start.lines[0]["step"] != start.step + 1:
        return 0.0
    first, *others = (float(line.get("step_s", 0.0)) for line in start.lines)
    return first_step_excess(first, sum(others), start.lines[-1]["step"] - start.lines[0]["step"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
