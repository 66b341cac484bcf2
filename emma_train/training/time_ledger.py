"""Measures the time of one start of a run by cause and writes it to ledger.jsonl (monitor/goodput.py)."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emma_train.monitor.goodput import LEDGER_FILE, MEASURED, first_step_excess, ledger_of
from emma_train.monitor.trackers import Guard, read_jsonl

WRITE_EVERY_S = 30.0
"""A line is written at least so often, so that a process that is killed leaves little time unexplained."""


class TimeLedger:
    """The clock of one start. Every rank has one; only that of the main rank writes.

    A write that fails is logged once and does not stop training.
    """

    def __init__(
        self, run: Path, step: int, begun_unix: float | None, stall_s: Callable[[], float], write: bool = True
    ) -> None:
        """`step`: the last one that is done; `begun_unix`: when this start began, before its imports and its model;
        None means now. `stall_s()`: seconds so far that training waited for saves."""
        self._path = run / LEDGER_FILE
        self._write = write
        self._stall_s = stall_s
        self._guard = Guard(LEDGER_FILE)
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        """Since the last line."""
        self._step = step
        self._num_steps, self._first_step_s, self._other_steps_s = 0, 0.0, 0.0
        self._written_unix = time.time()
        self._begun_unix = min(begun_unix or self._written_unix, self._written_unix)
        self._useful_before_s = 0.0
        if write:
            self._guard("start", self._start)

    def _start(self) -> None:
        line = {"begun_unix": self._begun_unix, "time_unix": self._written_unix, "step": self._step}
        before = read_jsonl(self._path) if self._path.is_file() else []
        if ledger := ledger_of([*before, line]):
            self._useful_before_s, self._begun_unix = ledger.seconds["steps"], ledger.begun_unix
        self._append(line)

    @contextmanager
    def measure(self, cause: str) -> Iterator[None]:
        """Count the time of this block under a name of MEASURED, without that in which training waited for a save."""
        started, stall_s = time.perf_counter(), self._stall_s()
        yield
        seconds, stalled = time.perf_counter() - started, self._stall_s() - stall_s
        self.add("checkpoint", stalled)
        self.add(cause, seconds - stalled)

    def add(self, cause: str, seconds: float) -> None:
        """Count seconds under a name of MEASURED; call it once for each step under `step`."""
        self._seconds[cause] += seconds
        if cause == "step":
            self._num_steps += 1
            if self._num_steps == 1:
                self._first_step_s = seconds
            else:
                self._other_steps_s += seconds

    def after_step(self, step: int, is_logged: bool) -> None:
        """`step` is done, with all that comes after it."""
        self._step = step
        if is_logged or self._num_steps == 1 or time.time() - self._written_unix > WRITE_EVERY_S:
            self._write_line()

    def goodput(self) -> float:
        """Share of the wall time of all starts so far in steps that did not have to be computed again."""
        excess_s = first_step_excess(self._first_step_s, self._other_steps_s, self._num_steps - 1)
        wall_s = time.time() - self._begun_unix
        useful_s = self._useful_before_s + self._first_step_s + self._other_steps_s - excess_s
        return useful_s / wall_s if wall_s > 0 else 0.0

    def close(self) -> None:
        """Write what was measured since the last line."""
        if any(self._seconds.values()):
            self._write_line()

    def _write_line(self) -> None:
        now = time.time()
        measured = {f"{name}_s": round(seconds, 6) for name, seconds in self._seconds.items() if seconds}
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        self._written_unix = now
        if self._write:
            self._guard("write", lambda: self._append({"time_unix": now, "step": self._step, **measured}))

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._path, "a+b") as file:
            is_torn = False  # by a process that was killed, or a disk that was full
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                is_torn = file.read(1) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(line).encode() + b"\n")
