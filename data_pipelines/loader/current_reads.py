"""What a rank's loader is doing, for a report of a run that hangs: samples that are being read, and its workers."""

import os
import signal
import tempfile
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from urllib.parse import urlsplit

from data_pipelines.planner.candidates import SampleRef
from emma_train.stacks import CONSOLE, all_stacks, describe_process

REPORT_SIGNAL = signal.SIGUSR2
"""Makes a loader worker write where it is; its trainer sends it."""
WORKER_ANSWER_S = 3.0
LONG_S = 5.0
"""A sample that is read for longer is named on the console."""
STATES = {"T": "is stopped (SIGSTOP)", "Z": "is dead", "D": "waits for a disk or a network file system"}
"""By the letter in /proc/PID/stat; in all others a process can answer."""


class CurrentReads:
    """Samples that this process is reading, and since when."""

    def __init__(self) -> None:
        self._started: dict[int, tuple[SampleRef, float]] = {}
        """By thread."""

    def start(self, sample: SampleRef) -> None:
        self._started[threading.get_ident()] = sample, time.monotonic()

    def end(self) -> None:
        self._started.pop(threading.get_ident(), None)

    def lines(self) -> list[str]:
        """The sample of each thread, the one that has been read for longest first."""
        now, lines = time.monotonic(), []
        for sample, started in sorted(self._started.copy().values(), key=lambda item: item[1]):
            shard = os.path.basename(urlsplit(sample.url).path)
            mark = CONSOLE if now - started > LONG_S else ""
            lines.append(f"{mark}reads {sample.key} of {shard} since {now - started:.0f} s")
        return lines


class WorkerReports:
    """A folder through which loader workers say where they are."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="emma-loader-")

    def path(self, pid: int) -> Path:
        return Path(self._folder.name) / str(pid)

    def register(self) -> None:
        """Called in a worker that has blocked REPORT_SIGNAL and waits for it: from now on it may be sent."""
        self.path(os.getpid()).touch()

    def write(self, number: int, reading: CurrentReads) -> None:
        """Called in a worker that got REPORT_SIGNAL."""
        lines = [describe_process(), *reading.lines(), all_stacks()]
        path = self.path(os.getpid())
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join([f"loader worker {number} (process {os.getpid()}) {lines[0]}", *lines[1:]]))
        partial.replace(path)

    def collect(self) -> list[str]:
        """Lines about each worker of this process. Takes up to WORKER_ANSWER_S where one does not answer."""
        workers = [pid for child in active_children() if (pid := child.pid) and self.path(pid).exists()]
        lines = []
        asked = []
        for pid in workers:
            if state := STATES.get(_state(pid)):
                lines.append(f"{CONSOLE}loader worker (process {pid}) {state}")
            else:
                self.path(pid).write_text("")
                os.kill(pid, REPORT_SIGNAL)
                asked.append(pid)
        deadline = time.monotonic() + WORKER_ANSWER_S
        while asked and time.monotonic() < deadline:
            for pid in [pid for pid in asked if self.path(pid).stat().st_size]:
                lines += self.path(pid).read_text().splitlines()
                asked.remove(pid)
            time.sleep(0.05)
        return lines + [f"{CONSOLE}loader worker (process {pid}) does not answer" for pid in asked]


def _state(pid: int) -> str:
    """The letter of a process's state; empty where this system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
