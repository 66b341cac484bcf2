"""What a loader says of itself: samples that are being read, and workers that are well, stopped or silent."""

import gc
import os
import re
import signal
import time
from multiprocessing import get_context

import pytest

from data_pipelines.loader.current_reads import CurrentReads, WorkerReports
from data_pipelines.loader.loader import _start_worker
from data_pipelines.planner.candidates import SampleRef

URL = "s3://bucket/train/shard-000007.tar?versionId=3"


def sample(key: str) -> SampleRef:
    return SampleRef(key, "i2t", URL, "", 0, 1, 0, 0, 0, 1, 1)


def work(reports: WorkerReports, key: str) -> None:
    """A loader worker that reads one sample for a minute."""
    reading = CurrentReads()
    _start_worker(3, reports, reading)
    reading.start(sample(key))
    time.sleep(60)


def test_samples_are_listed_while_they_are_read() -> None:
    reading = CurrentReads()
    assert reading.lines() == []
    reading.start(sample("a/1"))
    assert reading.lines() == ["reads a/1 of shard-000007.tar since 0 s"]
    reading.end()
    assert reading.lines() == []


def test_a_long_read_is_shown_on_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = CurrentReads()
    reading.start(sample("a/1"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 42)
    assert reading.lines() == ["! reads a/1 of shard-000007.tar since 42 s"]


def test_a_worker_collects_garbage_though_the_trainer_does_not() -> None:
    """As training/health.py has it, which would let memory of workers grow with every request to an object store."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def start() -> None:
        _start_worker(0, WorkerReports(), CurrentReads())
        sender.send(gc.isenabled())

    process = context.Process(target=start, daemon=True)
    gc.disable()
    try:
        process.start()
    finally:
        gc.enable()
    assert receiver.poll(20) and receiver.recv()
    process.join()


@pytest.mark.seconds
def test_workers_say_where_they_are_and_those_that_cannot_are_named() -> None:
    reports, context = WorkerReports(), get_context("fork")
    well, stopped = (context.Process(target=work, args=(reports, key), daemon=True) for key in ("well/1", "stopped/2"))
    other = context.Process(target=time.sleep, args=(60,), daemon=True)  # no loader worker: must get no signal
    for process in (well, stopped, other):
        process.start()
    try:
        assert well.pid and stopped.pid
        while not (reports.path(well.pid).exists() and reports.path(stopped.pid).exists()):
            time.sleep(0.01)
        os.kill(stopped.pid, signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)
        for _ in range(2):  # a second report is as good as the first
            lines = reports.collect()
            assert f"! loader worker (process {stopped.pid}) is stopped (SIGSTOP)" in lines
            first = lines.index(next(line for line in lines if line.startswith("loader worker 3")))
            assert lines[first].startswith(f"loader worker 3 (process {well.pid}) ")
            assert re.fullmatch(r"(! )?reads well/1 of shard-000007.tar since \d+ s", lines[first + 1])
            assert any("time.sleep(60)" in line for line in lines)
        assert other.is_alive()
    finally:
        for process in (well, stopped, other):
            process.kill()
