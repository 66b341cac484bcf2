"""Two jobs never train in one run folder; a job that is gone, however it went, keeps nobody out."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from emma_train.errors import UserError
from emma_train.training.run_lock import RunLock
from tests.helpers import ROOT

BEAT_S = 0.05
HOLD = """
import os, sys, time
from pathlib import Path
from emma_train.training.run_lock import RunLock
with RunLock(Path(sys.argv[1]), heartbeat_s=0.05):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.close(1)
        time.sleep(600)
    print("held", os.getpid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(run: Path, how: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run folder."""
    words = [sys.executable, "-c", HOLD, str(run), how]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"held {process.pid}\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """A heartbeat from somewhere else."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S / 2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def left_by(run: Path, host: str) -> Path:
    run.mkdir()
    (run / "lock").write_text(json.dumps({"host": host, "pid": 1, "job": "77", "since": "yesterday"}))
    return run / "lock"


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def lockf(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(run) as process:
        with pytest.raises(UserError, match="is being trained by another job") as error, RunLock(run):
            pass
        assert f"process {process.pid} on {socket.gethostname()}" in str(error.value)


@pytest.mark.parametrize("how", ["", "fork"])
def test_a_killed_job_keeps_nobody_out_even_where_its_workers_live_on(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    with holder(run, how) as process:
        process.kill()
        process.wait()
        with RunLock(run, heartbeat_s=60):  # no time to look at heartbeats: it is taken at once
            pass


def test_a_job_that_ends_well_leaves_no_name(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "run", heartbeat_s=60):
            assert (tmp_path / "run" / "lock").stat().st_size > 0
        assert (tmp_path / "run" / "lock").stat().st_size == 0


def test_the_job_of_slurm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run = tmp_path / "run"
    with (
        holder(run),
        pytest.raises(UserError, match="SLURM job 4711"),
        RunLock(run),
    ):
        pass


def test_a_lock_that_ends_at_the_node_is_backed_by_the_heartbeat(tmp_path: Path) -> None:
    """The kernel gives the lock, but the file says that another host has the run."""
    path = left_by(tmp_path / "run", "elsewhere")
    with (
        beating(path),
        pytest.raises(UserError, match="process 1 on elsewhere, SLURM job 77"),
        RunLock(tmp_path / "run", BEAT_S),
    ):
        pass
    with RunLock(tmp_path / "run", BEAT_S):
        # Looking at the heartbeat has closed the file once, which lets go of a POSIX lock: it must be taken anew.
        words = [sys.executable, "-c", HOLD, str(tmp_path / "run"), ""]
        child = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert f"another job (process {os.getpid()} on {socket.gethostname()}" in child.stderr


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_without_locks_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    refuse(monkeypatch, errno.ENOLCK)
    path = left_by(tmp_path / "run", host)
    with beating(path), pytest.raises(UserError, match="another job"), RunLock(tmp_path / "run", BEAT_S):
        pass
    with RunLock(tmp_path / "run", BEAT_S):
        before = path.stat().st_mtime_ns
        time.sleep(4 * BEAT_S)
        assert path.stat().st_mtime_ns > before


def test_the_lock_of_a_node_that_is_gone_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file server may keep the lock of a node that has lost power."""
    refuse(monkeypatch, errno.EAGAIN)
    path = left_by(tmp_path / "run", "elsewhere")
    with beating(path), pytest.raises(UserError, match="another job"), RunLock(tmp_path / "run", BEAT_S):
        pass
    with RunLock(tmp_path / "run", BEAT_S):
        assert "taken over from a job that is gone (process 1 on elsewhere" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set run.root"), RunLock(tmp_path / "file" / "run"):
        pass
