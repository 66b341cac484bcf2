"""The nodes of a run on this host: torchrun agents, the ranks that they start, and the ranks' loader workers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.agent import REGISTER_VARIABLE, run_agent
from tests.chaos.network import Network
from tests.distributed.spawn import family, fork_server, free_port

SHUTDOWN_S = 8


class Agent:
    """The process of an agent, forked or of a new interpreter."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        code = self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode
        return None if code is None else int(code)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code


@dataclass
class Nodes:
    """All nodes of a run. They start together; when one has ended in failure, the others get some time to follow."""

    network: Network
    code: Path
    """A folder with the packages that the nodes run."""
    logs: Path
    words: Sequence[str]
    """`train RECIPE key=value ...`"""
    environment: Mapping[str, str]
    fresh: bool = False
    """Start every agent and rank in a new interpreter, instead of forks."""
    agents: list[Agent] = field(default_factory=list)

    def start(self, layout: Sequence[int], max_restarts: int, fresh: bool = False) -> None:
        """One agent a node, with so many ranks each."""
        port = free_port()
        for path in self._register.iterdir():
            path.unlink()
        for node, num_ranks in enumerate(layout):
            words = ["--nproc-per-node", str(num_ranks), "--nnodes", str(len(layout))]
            words += ["--max-restarts", str(max_restarts), "--shutdown-timeout", str(SHUTDOWN_S)]
            words += ["--local-addr", self.network.address(node), "--rdzv-id", str(port)]
            words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.network.address(0)}:{port}"]
            words += ["--rdzv-conf", f"is_host={int(node == 0)}", "-m", "tests.chaos.trainer", *self.words]
            environment, log = self._environment(node, max_restarts), self.logs / f"node-{node}.log"
            if fresh or self.fresh:
                self.agents.append(self._start_interpreter(node, words, environment, log))
            else:
                arguments = (words, environment, str(self.code), str(log), self.network.namespace(node))
                process = fork_server().Process(target=run_agent, args=arguments)
                process.start()
                self.agents.append(Agent(process))

    def _start_interpreter(self, node: int, words: list[str], environment: dict[str, str], log: Path) -> Agent:
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [*self.network.command(node), sys.executable, "-m", "launchers.torchrun", *words],
                cwd=self.code,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        (self._register / str(process.pid)).write_text(json.dumps({"node": node}))
        return Agent(process)

    @property
    def _register(self) -> Path:
        folder = self.logs / "processes"
        folder.mkdir(exist_ok=True)
        return folder

    def _environment(self, node: int, max_restarts: int) -> dict[str, str]:
        skipped = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(skipped)}
        shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if max_restarts else {}
        marks = {REGISTER_VARIABLE: str(self._register), "EMMA_CHAOS_NODE": str(node)}
        more = {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1", **marks}
        return {**inherited, **self.network.environment(), **shared, **self.environment, **more}

    def codes(self) -> list[int | None]:
        """Exit codes of the agents; None of those that run."""
        return [agent.poll() for agent in self.agents]

    def registered(self) -> dict[int, dict[str, int]]:
        """Agents and ranks of this start, alive or not, by process: node and rank."""
        return {int(path.name): json.loads(path.read_text() or "{}") for path in self._register.iterdir()}

    def ranks(self) -> dict[int, int]:
        """Living processes of the trainer by rank."""
        return {entry["rank"]: pid for pid, entry in self.registered().items() if "rank" in entry and is_alive(pid)}

    def node_of(self, pid: int) -> int:
        return self.registered()[pid]["node"]

    def workers(self, rank_pid: int) -> list[int]:
        """Loader workers of a rank: it has forked them, so they have its command line."""
        command = _read(rank_pid, "cmdline")
        children = _read(rank_pid, f"task/{rank_pid}/children").split()
        return [int(child) for child in children if _read(int(child), "cmdline") == command]

    def signal(self, number: signal.Signals) -> None:
        """To all agents, as a cluster does where a job has to stop."""
        for agent in self.agents:
            if agent.poll() is None:
                send(agent.pid, number)

    def kill(self, node: int | None = None) -> None:
        """SIGKILL to all processes, or to all of a node: agents, ranks and what is left in the sessions of ranks."""
        for pid in self.processes(node):
            send(pid, signal.SIGKILL)

    def processes(self, node: int | None = None) -> list[int]:
        """All living processes of this start, or of a node."""
        some = [pid for pid, entry in self.registered().items() if node is None or entry.get("node") == node]
        # Agents first, so that none sees a rank end; a rank that was killed leaves loader workers in its session.
        members = [member for pid in sorted(some) for member in family(pid)]
        sessions = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        members += [pid for pid in sessions if _session_of(pid) in some]
        return [pid for pid in dict.fromkeys(members) if is_alive(pid)]

    def end(self, within_s: float) -> list[int]:
        """Wait for all agents, then kill what is left. Returns the exit codes."""
        deadline = time.monotonic() + within_s
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.1)
        while self.processes():
            self.kill()
            time.sleep(0.05)
        codes = [agent.wait() for agent in self.agents]
        self.agents.clear()
        return codes


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether the process runs or is stopped; one that only waits for its parent is dead."""
    return _read(pid, "stat").rpartition(") ")[2][:1] not in ("", "Z", "X")


def _session_of(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(") ")[2].split()
    return int(fields[3]) if fields else 0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
