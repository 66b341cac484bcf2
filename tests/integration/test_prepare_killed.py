"""Jobs whose driver or worker is killed, and jobs with 1, 2 and 4 workers, write the same bytes."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shards import every_task, write_shards

ROOT = Path(__file__).parents[2]
SLOW = """
import time
import pyarrow

def slow(records):
    time.sleep(0.05)
    return {"length": [len(record.image(record.image_names[0])) for record in records]}

slow.columns = {"length": pyarrow.int64()}
"""


def command(folder: Path, workers: int) -> list[str]:
    module = ["-m", "data_pipelines", "annotate", "slow", str(folder), "--operator", "slow_operator:slow"]
    return [sys.executable, *module, "--workers", str(workers)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow_operator.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    return write_shards(tmp_path / "set", every_task(20), per_shard=3)


def columns(folder: Path) -> dict[str, str]:
    """Hash of every file that the operator wrote, whatever it is called."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.slow.*")}


def remove_columns(folder: Path) -> None:
    for path in folder.glob("*.slow.*"):
        path.unlink()


@pytest.mark.slow
def test_a_driver_that_is_killed_at_ten_moments_leaves_the_same_files_and_repeats_no_finished_shard(
    folder: Path,
) -> None:
    subprocess.run(command(folder, 1), check=True, timeout=200)
    expected, rng = columns(folder), random.Random(0)
    remove_columns(folder)
    finished: dict[str, int] = {}
    for _ in range(10):
        kill_after_a_shard(command(folder, 1), folder, rng.uniform(0, 0.1))
        times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.slow.done.json")}
        assert {name: times.get(name) for name in finished} == finished
        if len(times) == len(list(folder.glob("*.tar"))):
            remove_columns(folder)
            times = {}
        finished = times
    subprocess.run(command(folder, 1), check=True, timeout=200)
    assert columns(folder) == expected


def kill_after_a_shard(words: list[str], folder: Path, wait_s: float) -> None:
    """Start a job and kill it some time after it has finished a further shard: before, it has only started."""
    num_before, deadline = len(list(folder.glob("*.slow.done.json"))), time.monotonic() + 100
    driver = subprocess.Popen(words)
    while driver.poll() is None and time.monotonic() < deadline:
        if len(list(folder.glob("*.slow.done.json"))) > num_before:
            break
        time.sleep(0.005)
    time.sleep(wait_s)
    driver.send_signal(signal.SIGKILL)
    driver.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a busy machine each of Ray's processes takes a minute to start
def test_two_and_four_workers_and_killed_workers_write_the_bytes_of_one(folder: Path) -> None:
    pytest.importorskip("ray")
    subprocess.run(command(folder, 1), check=True, timeout=200)
    expected = columns(folder)
    for workers in (2, 4):
        remove_columns(folder)
        driver = subprocess.Popen(command(folder, workers))
        killed: list[int] = []
        while driver.poll() is None and not killed:
            time.sleep(0.02)
            if list(folder.glob("*.slow.done.json")):
                killed = ray_workers(driver.pid)[:1]
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        assert driver.wait(timeout=400) == 0
        assert killed and columns(folder) == expected


def ray_workers(driver: int) -> list[int]:
    """Processes below the driver that run a task of ours; Ray's agents, which have such names too, end all of Ray."""
    import psutil

    processes = psutil.Process(driver).children(recursive=True) if psutil.pid_exists(driver) else []
    return [process.pid for process in processes if "ray::_outcome" in " ".join(process.cmdline())]
