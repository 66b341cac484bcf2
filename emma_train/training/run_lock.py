"""One job per run folder: a second one that starts while the first is alive is refused.

The main rank holds a POSIX lock on the file `lock`, which the kernel gives back however the process ends, and which NFS
passes to its server. Where the lock cannot tell (a file system without locks, or one that keeps them to a node), the
heartbeat does: the holder touches the file every few seconds, and who wants the folder looks whether that still moves.

The kernel also gives a POSIX lock back when the process closes the file a second time: nothing else here may open it.
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

log = logging.getLogger(__name__)
HEARTBEAT_S = 5.0
FILE = "lock"


class RunLock:
    """Holds a run folder while it is entered. Raises UserError where another job has it, or it cannot be written."""

    def __init__(self, run: Path, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._path, self._heartbeat_s = run / FILE, heartbeat_s
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
            os.ftruncate(self._descriptor, 0)  # an empty file says that nobody has to be waited for
        os.close(self._descriptor)

    def _take(self) -> None:
        holder, alone = self._holder(), self._lock()
        here = holder.get("host") == socket.gethostname()
        if alone is False and (here or not holder):
            self._refuse()
        if holder and not (here and alone):
            # A kernel knows its own processes only; of others the heartbeat tells.
            if self._beats(3 if alone else 12) or (self._lock() is False and alone):
                self._refuse()
            log.warning("%s: taken over from a job that is gone (%s)", self._path, _told(holder))
        me = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        text = json.dumps({**me, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def _refuse(self) -> NoReturn:
        holder = _told(self._holder())
        os.close(self._descriptor)
        raise UserError(
            f"{self._path.parent}: is being trained by another job ({holder}); stop it, or choose another run.name. "
            "Once that job has ended, the same command resumes the run"
        )

    def _lock(self) -> bool | None:
        """True: the kernel gave the lock. False: another process has it. None: the file system knows no locks."""
        try:
            # Of the process and not of the open file, so that loader workers which outlive a crash do not hold it.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EAGAIN) else None

    def _holder(self) -> dict[str, str]:
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return found if isinstance(found, dict) else {}
        except ValueError:
            return {}

    def _beats(self, beats: int) -> bool:
        """Whether the holder's heartbeat moves within so many. Compares the storage's clock with itself alone."""
        before = os.stat(self._path).st_mtime_ns
        deadline = time.monotonic() + beats * self._heartbeat_s
        while time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 5)
            # Opened anew, for network file systems ask their server then.
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):  # storage that comes back is touched again
                os.utime(self._path)


def _told(holder: dict[str, str]) -> str:
    if not holder:
        return "which left no name"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
