"""What a run is doing, read from its folder by any machine that sees it."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from emma_train.monitor.goodput import Ledger, read_ledger
from emma_train.monitor.trackers import read_jsonl

LOCK_FILE = "lock"
"""Held by the main rank while it trains, with its name in it; emptied when it lets go."""
HEARTBEAT_S = 5.0
"""Seconds between the times at which the holder touches the lock."""
STARTS_FILE = "starts.jsonl"
"""A line for each start: time_unix, step, world_size, host, job, commit."""
DIGESTS_FILE = "digests.jsonl"
"""A line for each step, and another one each time that it was computed again (training/step_digests.py)."""
GONE_AFTER_S = 60.0
"""A holder that has not touched the lock for so long is gone; clocks of machines differ by less."""
State = Literal["done", "running", "stopped", "crashed", "not started"]


@dataclass(frozen=True)
class RunState:
    """The state of one stage. A run that is done has saved its last step; a stopped one let go of its lock before."""

    name: str
    state: State
    step: int
    """The newest step that was logged or saved."""
    steps: int | None
    """Steps of the recipe; None where it cannot be read."""
    saved: int
    """Step of the newest checkpoint; 0 without one in the run folder."""
    row: dict[str, Any]
    """The newest metrics."""
    starts: list[dict[str, Any]]
    holder: dict[str, Any]
    """Host, process, job and time of the process that trains or did when it crashed."""
    ledger: Ledger | None = None
    """Where the time of all starts went."""

    @property
    def left_s(self) -> float | None:
        """Seconds of training that are left, by the time of the newest step."""
        step_s = self.row.get("step_s")
        return (self.steps - self.step) * step_s if self.steps and isinstance(step_s, int | float) else None

    @property
    def world_sizes(self) -> list[int]:
        """Ranks of each start."""
        return [int(start.get("world_size", 0)) for start in self.starts]


def read_run_state(folder: Path, now: float | None = None) -> RunState:
    """The state of a run folder; what is missing or torn in it is left out. now: Unix time."""
    metrics, starts = folder / "metrics.jsonl", folder / STARTS_FILE
    rows = read_jsonl(metrics) if metrics.is_file() else []
    row = rows[-1] if rows else {}
    saved, steps, holder = _saved_step(folder), _planned_steps(folder), _holder(folder)
    step = max(saved, int(row.get("step", 0)))
    return RunState(
        folder.resolve().name,
        _state(folder, step, steps, bool(holder), time.time() if now is None else now),
        step,
        steps,
        saved,
        row,
        read_jsonl(starts) if starts.is_file() else [],
        holder,
        read_ledger(folder),
    )


def _state(folder: Path, step: int, steps: int | None, has_holder: bool, now: float) -> State:
    if steps and step >= steps:
        return "done"
    if has_holder:
        age_s = now - (folder / LOCK_FILE).stat().st_mtime
        return "running" if age_s < GONE_AFTER_S else "crashed"
    return "stopped" if step or (folder / LOCK_FILE).exists() else "not started"


def _saved_step(folder: Path) -> int:
    try:
        match = re.fullmatch(r"step-(\d+)\s*", (folder / "checkpoints" / "latest").read_text())
    except (OSError, UnicodeDecodeError):
        return 0
    return int(match[1]) if match else 0


def _planned_steps(folder: Path) -> int | None:
    try:
        steps = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
