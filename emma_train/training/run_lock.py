"""One job per run folder: a second one fails to start while the first is alive.

The main rank holds a POSIX lock on the file `lock`. The kernel releases it however the process ends, and NFS forwards
it to the server. Some file systems have no locks, or keep them local to a node. For those there is a heartbeat: the
holder touches the file every few seconds, and a second job checks whether its time stamp still changes.

The kernel also releases a POSIX lock when the process closes any other descriptor of the file: open it nowhere else.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from emma_train.errors import UserError
from emma_train.monitor.run_state import HEARTBEAT_S, LOCK_FILE

log = logging.getLogger(__name__)


class RunLock:
    """Holds a run folder inside its `with` block. Raises UserError if another job has it, or it cannot be written."""

    def __init__(self, run: Path, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._path, self._heartbeat_s = run / LOCK_FILE, heartbeat_s
        self._descriptor = -1
        self._released = threading.Event()

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            self._take()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror}); set run.root") from None
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)  # an empty file means that no heartbeat must be waited for
        os.close(self._descriptor)

    def _take(self) -> None:
        holder, locked = self._holder(), self._lock()
        same_host = holder.get("host") == socket.gethostname()
        if locked is False and (same_host or not holder):
            self._refuse()
        if holder and not (same_host and locked):
            # The kernel may know only processes of this host: watch the heartbeat of others.
            if self._beats(3 if locked else 12) or (self._lock() is False and locked):
                self._refuse()
            log.warning("%s: taken over from a job that is gone (%s)", self._path, _describe_holder(holder))
        this_job = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        text = json.dumps({**this_job, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def _refuse(self) -> NoReturn:
        holder = _describe_holder(self._holder())
        os.close(self._descriptor)
        raise UserError(
            f"{self._path.parent}: is being trained by another job ({holder}); stop it, or choose another run.name. "
            "Once that job has ended, the same command resumes the run"
        )

    def _lock(self) -> bool | None:
        """True: the kernel gave the lock. False: another process has it. None: the file system has no locks."""
        try:
            # lockf, not flock: its lock belongs to the process, so loader workers that outlive a crash do not keep it.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EAGAIN) else None

    def _holder(self) -> dict[str, str]:
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
            return holder if isinstance(holder, dict) else {}
        except ValueError:
            return {}

    def _beats(self, beats: int) -> bool:
        """Whether the holder touches the file within `beats` heartbeats. Compares time stamps of the storage only."""
        before = os.stat(self._path).st_mtime_ns
        deadline = time.monotonic() + beats * self._heartbeat_s
        while time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 5)
            # Open it anew: network file systems then ask their server.
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):  # the next beat may succeed
                os.utime(self._path)


def _describe_holder(holder: dict[str, str]) -> str:
    if not holder:
        return "which left no name"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
