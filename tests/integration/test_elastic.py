"""Three nodes on this host, one of which is killed for good: training goes on with two, and learns the same."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emma_train.cli import main
from launchers.command import ELASTIC_CONF, Elastic, torchrun_command
from launchers.options import LaunchOptions
from tests.helpers import ROOT, recipe_values, write_recipe
from tests.runs import metrics, train

STEPS, KILLED_AFTER = 14, 6
QUICK_CONF = "last_call_timeout=1,keep_alive_interval=1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """Agents of an elastic job on this host; node n2 keeps the rendezvous."""

    def __init__(self, recipe: Path, run: Path, logs: Path) -> None:
        self._recipe, self._run, self._logs = recipe, run, logs
        self._endpoint = f"127.0.0.1:{free_port()}"
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        rank = 0 if name == "n2" else 1
        options = LaunchOptions(nnodes=3, min_nodes=2, nproc=1, node_rank=rank, rdzv_endpoint=self._endpoint)
        command = torchrun_command(str(self._recipe), (), options, None, Elastic((2, 3), 3, self._run))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": name}
        # A node counts as lost after three seconds instead of fifteen.
        line = [sys.executable, *(word.replace(ELASTIC_CONF, QUICK_CONF) for word in command[1:])]
        with open(self._logs / name, "ab") as output:
            self.agents[name] = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def output(self) -> str:
        return "".join((self._logs / name).read_text() for name in self.agents)

    def kill(self, name: str) -> None:
        """End the agent and its processes at once, as when a node loses its power."""
        processes = family(self.agents[name].pid)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                os.kill(process, number)
        self.agents[name].wait()

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while not (self._run / "metrics.jsonl").is_file() or len(metrics(self._run)) < step:
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)


def family(process: int) -> list[int]:
    """A process and all below it."""
    children = [int(n) for path in Path(f"/proc/{process}/task").glob("*/children") for n in path.read_text().split()]
    return [process, *(below for child in children for below in family(child))]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    run = {"run__root": str(tmp_path), "run__name": "run", "train__steps": STEPS, "train__save_every": 2}
    recipe = recipe_values(**run, data__slots=6, data__samples_per_step=18)
    started = Nodes(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "run", tmp_path)
    yield started
    for name, agent in started.agents.items():
        if agent.poll() is None:
            started.kill(name)


@pytest.mark.slow
def test_two_of_three_nodes_go_on_and_learn_the_same(nodes: Nodes, tmp_path: Path) -> None:
    for name in ("n0", "n1", "n2"):
        nodes.start(name)
    nodes.wait_for_step(KILLED_AFTER)
    (training,) = re.findall(r"launch: training on 3 nodes \((.*)\)", nodes.output())
    rank_0 = training.split(", ")[0]
    lost = rank_0 if rank_0 != "n2" else "n0"  # whose process keeps the store of the ranks, if possible
    nodes.kill(lost)
    rows = len(metrics(tmp_path / "run"))
    assert rows < STEPS
    for name in {"n0", "n1", "n2"} - {lost}:
        assert nodes.agents[name].wait(timeout=120) == 0, nodes.output()
    assert re.search(r"launch: training on 2 nodes \(\w+, \w+\), 3 before", nodes.output())
    assert "Traceback" not in nodes.output()
    train(tmp_path / "recipe.yaml", "run.name=straight")
    assert main(["audit", str(tmp_path / "straight"), str(tmp_path / "run")]) == 0
