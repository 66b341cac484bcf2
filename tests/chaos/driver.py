"""Keeps a run going, injects one fault after another, and writes down what followed from each."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.faults import FAULTS, Injected, Target
from tests.chaos.nodes import Nodes
from tests.chaos.run_view import Mark, suspects

log = logging.getLogger(__name__)
FOLLOW_S = 10.0
"""So long the other nodes have to end after the first one has."""
RECOVERY_S = 300.0
"""A fault from which the run has not recovered by then is a problem."""
DONE, STOPPED, USAGE = 0, 75, 2


@dataclass
class Event:
    """A fault and what followed from it."""

    number: int
    kind: str
    what: str
    time_unix: float
    step: int
    """The last step before it."""
    ranks: int
    max_restarts: int
    """Restarts that the agents were allowed; the driver starts the run again where they end."""
    over_s: float = 0.0
    """Until it had its effect."""
    recovered_s: float = 0.0
    """Until a step was done that had not been done before."""
    lost_s: float = 0.0
    """The same, without the usual time of the steps that were gained."""
    starts: int = 0
    """Starts of the agents that followed."""
    named: list[int] = field(default_factory=list)
    """Ranks that the consoles name."""
    named_s: float | None = None
    """Until they were named."""
    problems: list[str] = field(default_factory=list)


class RunEnded(Exception):
    """The run has done all its steps."""


class Driver:
    """Start, faults and end of a run."""

    def __init__(self, target: Target, record: Path) -> None:
        self.target = target
        self.record = record
        self.events: list[Event] = []
        self.num_starts = 0
        self.max_restarts = 0
        self.codes: list[list[int]] = []
        self._first_end: float | None = None
        self._commit = ""
        """Of the code at the last start."""

    @property
    def nodes(self) -> Nodes:
        return self.target.nodes

    def start(self) -> None:
        self.num_starts += 1
        self._first_end = None
        log.info("start %d: %s ranks", self.num_starts, "+".join(map(str, self.target.layout)))
        commit = (self.target.code / "COMMIT").read_text()
        # Forks have the code that was imported first.
        fresh = commit != self._commit and self._commit != ""
        self.max_restarts = 0 if fresh else self.target.rng.choice((0, 3))
        self.nodes.start(self.target.layout, self.max_restarts, fresh)
        self._commit = commit

    def supervise(self) -> None:
        """Start the run again when an agent has ended. Raises RunEnded at its end, RuntimeError at exit code 2."""
        codes = self.nodes.codes()
        if all(code is None for code in codes):
            return
        now = time.monotonic()
        self._first_end = self._first_end or now
        if None in codes and now - self._first_end < FOLLOW_S:
            return
        ended = self.nodes.end(0)
        self.codes.append(ended)
        log.info("ended with %s", ended)
        if set(ended) == {DONE}:
            raise RunEnded
        if USAGE in ended:
            raise RuntimeError(f"exit code 2: see {self.nodes.logs}")
        self.start()

    def wait_for_step(self, step: int, within_s: float = RECOVERY_S, new_since: float = 0.0) -> bool:
        """Whether a row of `step` or a later one came in time, written after `new_since`."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            row = self.target.view.last_row()
            if row["step"] >= step and row["time_unix"] > new_since:
                return True
            self.supervise()
            time.sleep(0.1)
        return False

    def inject(self, kind: str) -> Event:
        """One fault and the recovery from it."""
        target = self.target
        step_s, mark = target.view.step_s(), target.view.mark()
        event = Event(
            len(self.events) + 1, kind, "", time.time(), target.view.last_row()["step"],
            len(self.nodes.ranks()), self.max_restarts,
        )  # fmt: skip
        starts = self.num_starts
        injected = FAULTS[kind](target)
        event.what = injected.what
        log.info("fault %d after step %d: %s: %s", event.number, event.step, kind, injected.what)
        reached = self._wait_until_over(injected, event, mark)
        injected.undo()
        over = time.time()
        event.over_s = over - event.time_unix
        if not self.wait_for_step(reached + 1, new_since=over):
            event.problems.append(f"no new step within {RECOVERY_S:g} s")
            self.nodes.kill()
        last = target.view.last_row()
        event.recovered_s = last["time_unix"] - event.time_unix
        event.lost_s = max(0.0, event.recovered_s - step_s * (last["step"] - event.step))
        event.starts = self.num_starts - starts
        self._look_for_names(injected, event, mark)
        self.events.append(event)
        with open(self.record, "a") as file:
            file.write(json.dumps(asdict(event)) + "\n")
        log.info(
            "fault %d: recovered at step %d after %.1f s, %.1f s lost; named %s %s",
            event.number, last["step"], event.recovered_s, event.lost_s, event.named, event.problems or "",
        )  # fmt: skip
        return event

    def _wait_until_over(self, injected: Injected, event: Event, mark: Mark) -> int:
        """Returns the highest step that was seen until the fault had its effect."""
        reached, deadline = event.step, time.monotonic() + RECOVERY_S
        while True:
            is_over = injected.is_over()
            reached = max(reached, self.target.view.last_row()["step"])
            if event.named_s is None and injected.ranks and set(injected.ranks) & suspects(self._said(mark)):
                event.named_s = time.time() - event.time_unix
            if is_over:
                return reached
            if time.monotonic() > deadline:
                event.problems.append(f"no effect within {RECOVERY_S:g} s")
                return reached
            self.supervise()
            time.sleep(0.1)

    def _said(self, mark: Mark) -> str:
        return self.target.view.console(mark)

    def _look_for_names(self, injected: Injected, event: Event, mark: Mark) -> None:
        text = self._said(mark)
        event.named = sorted(suspects(text))
        if injected.ranks and not set(injected.ranks) <= set(event.named):
            event.problems.append(f"not named: ranks {sorted(set(injected.ranks) - set(event.named))}")
        if injected.ranks and (others := set(event.named) - set(injected.ranks)):
            event.problems.append(f"named besides: ranks {sorted(others)}")
        if injected.text and injected.text not in text:
            event.problems.append(f"the consoles do not say {injected.text!r}")

    def finish(self, words: Sequence[str], extra_steps: int) -> int:
        """Stop the run, and start it with a last step. Returns that step. `words`: of the command."""
        self.wait_for_step(self.target.view.last_row()["step"] + 1)
        last = self.target.view.last_row()["step"] + extra_steps
        self.nodes.kill()
        self.codes.append(self.nodes.end(0))
        self.nodes.words = [*words, f"train.steps={last}"]
        self.start()
        try:
            while True:
                self.supervise()
                time.sleep(0.1)
        except RunEnded:
            return int(last)
