"""Runs the trials of an ablation as processes, several at once; a stop is passed on to them."""

import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emma_train.errors import UserError

log = logging.getLogger(__name__)
EXIT_STOPPED = 75
"""A run that was asked to stop has saved, and goes on when it is started again."""
WAIT_S = 0.5
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


@dataclass
class TrialJob:
    """Commands that run one after another."""

    name: str
    folder: Path
    """That they write into: no other job that writes into it runs at the same time."""
    commands: Sequence[Sequence[str]]
    log: Path
    """Output of the commands is added to this file."""
    finish: Callable[[], None]
    """Called when all commands have ended well."""


@dataclass
class _Running:
    job: TrialJob
    lane: int
    number: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None)


def run_all(
    all_jobs: Sequence[TrialJob],
    environments: Sequence[Mapping[str, str]],
    is_stopping: Callable[[], bool],
) -> tuple[list[str], bool]:
    """Run all jobs, as many at once as there are environments, each in one of them.

    Returns (a line for each job that failed, whether some were stopped or not begun). A failure stops nothing else.
    """
    lanes = _Lanes(environments)
    waiting, failures = list(all_jobs), list[str]()
    try:
        while lanes.running or (waiting and not lanes.stopped):
            if is_stopping():
                lanes.stop()
            while (job := lanes.next_of(waiting)) is not None:
                waiting.remove(job)
                lanes.start(job)
            failures += lanes.poll()
            time.sleep(WAIT_S if lanes.running else 0)
    finally:
        lanes.stop()  # nothing goes on alone where an error ends this process
    return failures, lanes.num_finished + len(failures) < len(all_jobs)


class _Lanes:
    """The processes that run, each in a lane with its environment."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self.environments = environments
        self.running: list[_Running] = []
        self.stopped = False
        self.num_finished = 0

    def next_of(self, waiting: Sequence[TrialJob]) -> TrialJob | None:
        """The first job that may start now: there is a lane, and no running one writes into its folder."""
        if self.stopped or len(self.running) == len(self.environments):
            return None
        used = {one.job.folder for one in self.running}
        return next((job for job in waiting if job.folder not in used), None)

    def start(self, job: TrialJob) -> None:
        """Start the first command of a job. Raises UserError where its output cannot be written."""
        lane = min(set(range(len(self.environments))) - {one.lane for one in self.running})
        one = _Running(job, lane)
        self._start_command(one)
        self.running.append(one)

    def poll(self) -> list[str]:
        """Start the next command where one has ended well, and finish a job after its last. Returns failures."""
        failures = []
        for one in list(self.running):
            assert one.process is not None
            if (code := one.process.poll()) is None:
                continue
            is_last = one.number + 1 == len(one.job.commands)
            if code == 0 and not is_last and not self.stopped:
                one.number += 1
                self._start_command(one)
                continue
            self.running.remove(one)
            if code == 0 and is_last:
                one.job.finish()
                self.num_finished += 1
            elif code == EXIT_STOPPED:
                self.stop()
            elif code and not self.stopped:
                failures.append(f"{one.job.name} failed (exit code {code}): {_last_line(one.job.log)}")
                log.error(failures[-1])
        return failures

    def stop(self) -> None:
        """Ask every process once to save and end."""
        if not self.stopped:
            for one in self.running:
                if one.process is not None:
                    one.process.terminate()
        self.stopped = True

    def _start_command(self, one: _Running) -> None:
        command = one.job.commands[one.number]
        log.info("%s: %s (output in %s)", one.job.name, command[3], one.job.log)
        environment = {**os.environ, **self.environments[one.lane]}
        try:
            one.job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(one.job.log, "ab") as output:
                # In a new session Ctrl-C reaches only this process, which then asks each run once to stop.
                one.process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_stop_with_parent,
                )
        except OSError as error:
            raise UserError(f"{one.job.log}: cannot be written ({error.strerror}); name another --root") from None


def _stop_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent dies: a run that goes on alone would keep its folder
    locked against the next start."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {path}")
