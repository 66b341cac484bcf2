"""Nodes on this host that are lost and come back: training goes on with those that are left, and learns the same."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emma_train.cli import main
from launchers.command import ELASTIC_CONF, Elastic, torchrun_command
from launchers.options import LaunchOptions
from tests.chaos.agent import run_agent
from tests.chaos.nodes import Agent, send
from tests.chaos.trainer import SHORT_WAITS_VARIABLE
from tests.distributed.spawn import family, fork_server, free_port
from tests.helpers import ROOT, recipe_values, write_recipe
from tests.runs import metrics, train

KEEPER = "n2"
"""The node that keeps the rendezvous, which must not be lost."""
NAMES = ("n0", "n1", KEEPER, "n3")
QUICK_CONF = "last_call_timeout=1,keep_alive_interval=1"
"""A node counts as lost after three seconds instead of fifteen."""


class Nodes:
    """Agents of an elastic job on this host, each with one process; packs are for two or three of them."""

    def __init__(self, recipe: Path, run: Path, logs: Path) -> None:
        self._recipe, self._run, self._logs = recipe, run, logs
        self._endpoint = f"127.0.0.1:{free_port()}"
        self.agents: dict[str, Agent] = {}

    def start(self, name: str) -> None:
        rank = 0 if name == KEEPER else 1
        options = LaunchOptions(nnodes=4, min_nodes=2, nproc=1, node_rank=rank, rdzv_endpoint=self._endpoint)
        command = torchrun_command(str(self._recipe), (), options, None, Elastic((2, 3), 4, self._run))
        words = [word.replace(ELASTIC_CONF, QUICK_CONF) for word in command[command.index("launchers.torchrun") + 1 :]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": name, SHORT_WAITS_VARIABLE: "1"}
        log = str(self._logs / name)
        process = fork_server().Process(target=run_agent, args=(words, environment, str(ROOT), log, ""))
        process.start()
        self.agents[name] = Agent(process)

    def output(self) -> str:
        return "".join((self._logs / name).read_text() for name in NAMES if (self._logs / name).is_file())

    def kill(self, name: str) -> None:
        """End the agent and its processes at once, as when a node loses its power."""
        processes = family(self.agents[name].pid)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                send(process, number)
        self.agents[name].wait()

    def trained(self) -> list[list[str]]:
        """The nodes of each start, by rank of their processes."""
        return [line.split(", ") for line in re.findall(r"launch: training on \d nodes \((.*?)\)", self.output())]

    def wait_for_steps(self, starts: int, steps: int) -> list[str]:
        """Wait until so many steps are done after that start. Returns its nodes."""
        end, before = time.monotonic() + 100, 10**9
        while len(self.trained()) < starts or self.last_step() < before + steps:
            assert time.monotonic() < end and len(self.trained()) <= starts, self.output()
            if len(self.trained()) == starts:
                before = min(before, self.last_step())
            time.sleep(0.05)
        return self.trained()[-1]

    def last_step(self) -> int:
        rows = metrics(self._run) if (self._run / "metrics.jsonl").is_file() else []
        return int(rows[-1]["step"]) if rows else 0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    run = {"run__root": str(tmp_path), "run__name": "run", "train__steps": 10**6, "train__save_every": 2}
    recipe = recipe_values(**run, data__slots=6, data__samples_per_step=18)
    started = Nodes(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "run", tmp_path)
    yield started
    for name, agent in started.agents.items():
        if agent.poll() is None:
            started.kill(name)


@pytest.mark.slow
def test_nodes_are_lost_replaced_and_come_back_and_the_run_learns_the_same(nodes: Nodes, tmp_path: Path) -> None:
    """Three nodes and a spare. Two are killed for good, one after the other, with the processes that keep the store of
    the ranks where possible: the spare takes over, then two nodes go on; one comes back: three again."""
    for name in NAMES:
        nodes.start(name)
    first = nodes.wait_for_steps(starts=1, steps=4)
    (spare,) = set(NAMES) - set(first)
    lost = next(name for name in first if name != KEEPER)
    nodes.kill(lost)
    second = nodes.wait_for_steps(starts=2, steps=2)
    assert set(second) == {*first, spare} - {lost}
    also_lost = next(name for name in second if name != KEEPER)
    nodes.kill(also_lost)
    third = nodes.wait_for_steps(starts=3, steps=2)
    assert set(third) == set(second) - {also_lost}
    nodes.start(lost)
    fourth = nodes.wait_for_steps(starts=4, steps=2)
    assert set(fourth) == {*third, lost}
    for name in fourth:
        send(nodes.agents[name].pid, signal.SIGTERM)
    assert [nodes.agents[name].wait() for name in fourth] == [75, 75, 75], nodes.output()
    train(tmp_path / "recipe.yaml", "run.name=straight", f"train.steps={nodes.last_step()}")
    assert main(["audit", str(tmp_path / "straight"), str(tmp_path / "run")]) == 0
