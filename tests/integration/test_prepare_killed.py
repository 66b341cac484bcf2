"""Jobs whose driver or worker is killed, and jobs with 1, 2 and 4 workers, write the same bytes."""

import hashlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.helpers import ASSETS
from tests.public_formats import write_finevision
from tests.shards import every_task, write_shards

ROOT = Path(__file__).parents[2]
SLOW = """
import os
import time
import pyarrow

def slow(records):
    time.sleep(float(os.environ.get("SLOW_S", "0.05")))
    return {"length": [len(record.image(record.image_names[0])) for record in records]}

slow.columns = {"length": pyarrow.int64()}
"""
RAY_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
"""Environment of a cluster and of its drivers: nobody else can use it, whatever Ray's settings on this machine."""
RAY_NICENESS = {"RAY_worker_niceness": "0"}
"""Ray starts its workers at a low priority, at which a busy machine may give them no time at all."""


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
        finished = finished_shards(folder, finished, expected)
    subprocess.run(command(folder, 1), check=True, timeout=200)
    assert columns(folder) == expected


def finished_shards(folder: Path, before: dict[str, int], expected: dict[str, str]) -> dict[str, int]:
    """Time of the marker of each finished shard; those of `before` must not have been written again, and all files
    must be as expected. Where all shards are finished, their columns are removed, so that there is something to do."""
    files = {path.name for path in folder.glob("*.slow.*") if path.suffix != ".tmp"}
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    assert hashes.items() <= expected.items()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.slow.done.json")}
    assert {name: times.get(name) for name in before} == before
    if len(times) < len(list(folder.glob("*.tar"))):
        return times
    remove_columns(folder)
    return {}


def kill_after_a_shard(words: list[str], folder: Path, wait_s: float, head: int = 0) -> int:
    """Start a job and kill it some time after it has finished a further shard: before, it has only started. Returns the
    number of processes of Ray (of the cluster `head`, or the job's) that ran a task then."""
    num_before, deadline = len(list(folder.glob("*.slow.done.json"))), time.monotonic() + 300
    driver = subprocess.Popen(words)
    while driver.poll() is None and time.monotonic() < deadline:
        if len(list(folder.glob("*.slow.done.json"))) > num_before:
            break
        time.sleep(0.005)
    time.sleep(wait_s)
    num_alive = len(running_tasks(head or driver.pid))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    return num_alive


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address and process of a Ray cluster on this machine, whose workers can import the operator."""
    pytest.importorskip("ray")
    modules, sessions = tmp_path_factory.mktemp("modules"), tempfile.mkdtemp(prefix="ray")
    (modules / "slow_operator.py").write_text(SLOW)
    port, *others = free_ports(4)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    words += [f"--{name}={number}" for name, number in zip(names, others, strict=True)]
    words += ["--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats"]
    words += [f"--temp-dir={sessions}", f"--object-store-memory={128 << 20}"]
    path = f"{ROOT}{os.pathsep}{modules}"
    environment = (
        {
            **os.environ,
            "PYTHONPATH": path,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "SLOW_S": "0.3",
        }
        | RAY_TOKEN
        | RAY_NICENESS
    )
    head = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        started = head.stdout is not None and any("Ray runtime started" in line for line in head.stdout)
        if not started:
            pytest.skip("no Ray cluster can be started on this machine")
        yield f"127.0.0.1:{port}", head.pid
    finally:
        end_all(head)
        shutil.rmtree(sessions, ignore_errors=True)


def free_ports(num: int) -> list[int]:
    """Ports of this machine that nothing listens at."""
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def end_all(head: subprocess.Popen[str]) -> None:
    """End a process and all that it started; `ray stop` would end every Ray of this machine."""
    import psutil

    processes = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in (*alive, *([head] if head.poll() is None else [])):
        process.kill()
    head.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_cluster_drivers_and_workers_are_killed_and_the_bytes_are_those_of_one_process(
    folder: Path, cluster: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver at some moments (NUM_KILLS, 3) while its workers run, then a worker. What was finished is not done
    again, and all that 2 and 4 workers finish has the bytes of one."""
    subprocess.run(command(folder, 1), check=True, timeout=200)
    expected, rng = columns(folder), random.Random(1)
    remove_columns(folder)
    finished: dict[str, int] = {}
    (address, head), num_alive = cluster, 0
    monkeypatch.chdir(folder.parent)  # whose paths the workers understand, too
    for name, value in RAY_TOKEN.items():
        monkeypatch.setenv(name, value)
    for workers in islice(cycle((2, 4)), int(os.environ.get("NUM_KILLS", "3"))):
        words = [*command(Path("set"), workers), "--address", address]
        num_alive += kill_after_a_shard(words, folder, rng.uniform(0, 0.3), head)
        finished = finished_shards(folder, finished, expected)
    assert num_alive
    driver = subprocess.Popen([*command(folder, 4), "--address", address])
    killed: list[int] = []
    while driver.poll() is None and not killed:
        time.sleep(0.02)
        if len(list(folder.glob("*.slow.done.json"))) > len(finished):
            killed = running_tasks(head)[:1]
    for worker in killed:
        os.kill(worker, signal.SIGKILL)
    assert driver.wait(timeout=200) == 0
    assert killed and columns(folder) == expected
    finished_shards(folder, finished, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_import_on_a_cluster_writes_the_bytes_of_one_process(
    tmp_path: Path, cluster: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_finevision(tmp_path / "source", f"config{number}", num=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in RAY_TOKEN.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "data_pipelines", "import", "finevision", "source"]
    options = ["--tokenizer", str(ASSETS / "tokenizer"), "--workers", "2", "--shard-samples", "3"]
    subprocess.run([*words, "local", *options], check=True, timeout=200)
    subprocess.run([*words, "cluster", *options, "--address", cluster[0]], check=True, timeout=200)
    names = sorted(path.name for path in (tmp_path / "local").iterdir() if path.is_file())
    assert len(names) >= 2 * 2 * 3 and names == sorted(p.name for p in (tmp_path / "cluster").iterdir() if p.is_file())
    for name in names:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "cluster" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a busy machine each of Ray's processes takes a minute to start
def test_a_driver_that_is_killed_with_its_ray_leaves_nothing_that_hinders_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    subprocess.run(command(folder, 1), check=True, timeout=200)
    expected = columns(folder)
    remove_columns(folder)
    for name, value in RAY_NICENESS.items() | {("SLOW_S", "0.3")}:
        monkeypatch.setenv(name, value)
    assert kill_after_a_shard(command(folder, 2), folder, 0.05)
    finished = finished_shards(folder, {}, expected)
    subprocess.run(command(folder, 2), check=True, timeout=400)
    assert columns(folder) == expected
    finished_shards(folder, finished, expected)


def running_tasks(root: int) -> list[int]:
    """Processes below a process that run a task of ours; Ray's agents, which have such names too, end all of Ray."""
    import psutil

    processes = psutil.Process(root).children(recursive=True) if psutil.pid_exists(root) else []
    return [process.pid for process in processes if "ray::_outcome" in " ".join(process.cmdline())]
