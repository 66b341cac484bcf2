"""The kinds of faults. Each function injects one fault and says what must follow from it."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.disk import SmallDisk
from tests.chaos.network import Network
from tests.chaos.nodes import Nodes, is_alive, send
from tests.chaos.run_view import RunView
from tests.chaos.store import FaultyStore

LAYOUTS = ((1, 1), (2, 1), (1, 2))
"""Ranks of each of the two nodes."""
PAUSE_S = 4.0


@dataclass
class Target:
    """All that faults act on."""

    rng: random.Random
    nodes: Nodes
    view: RunView
    store: FaultyStore
    disk: SmallDisk
    network: Network
    code: Path
    flips: Path
    """Where files ask for flips of gradients (trainer.py)."""
    layout: tuple[int, ...] = LAYOUTS[0]

    def pick_rank(self) -> tuple[int, int]:
        """A rank and its process."""
        return self.rng.choice(sorted(self.nodes.ranks().items()))


@dataclass(frozen=True)
class Injected:
    """A fault that has been injected."""

    what: str
    is_over: Callable[[], bool] = lambda: True
    """Whether it has had its effect."""
    undo: Callable[[], None] = lambda: None
    """Repair what an operator would repair; called when it is over."""
    ranks: tuple[int, ...] = ()
    """Ranks that must be named."""
    text: str = ""
    """What the consoles must say."""


def kill_rank(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    send(pid, signal.SIGKILL)
    return Injected(f"SIGKILL of rank {rank}", lambda: not is_alive(pid))


def kill_worker(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    worker = target.rng.choice(target.nodes.workers(pid))
    send(worker, signal.SIGKILL)
    return Injected(f"SIGKILL of a loader worker of rank {rank}", lambda: not is_alive(pid))


def kill_agent(target: Target) -> Injected:
    """The node's ranks follow its agent after a second, as under a cluster's cgroup."""
    node = target.rng.randrange(len(target.layout))
    send(target.nodes.agents[node].pid, signal.SIGKILL)
    time.sleep(1)
    target.nodes.kill(node)
    return Injected(f"SIGKILL of the agent of node {node}")


def kill_all(target: Target) -> Injected:
    target.nodes.kill()
    return Injected("SIGKILL of all processes")


def ask_to_stop(target: Target) -> Injected:
    target.nodes.signal(signal.SIGTERM)
    return Injected("SIGTERM to all agents", lambda: not target.nodes.ranks(), text="stopping after this step")


def ask_a_rank_to_stop(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    send(pid, signal.SIGUSR1)
    return Injected(f"SIGUSR1 to rank {rank}", lambda: not is_alive(pid), text="stopping after this step")


def stop_rank(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    send(pid, signal.SIGSTOP)
    return Injected(f"SIGSTOP of rank {rank}", lambda: not is_alive(pid), ranks=(rank,))


def stop_worker(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    worker = target.rng.choice(target.nodes.workers(pid))
    send(worker, signal.SIGSTOP)
    text = f"loader worker (process {worker}) is stopped"
    return Injected(f"SIGSTOP of a loader worker of rank {rank}", lambda: not is_alive(pid), ranks=(rank,), text=text)


def pause_rank(target: Target) -> Injected:
    rank, pid = target.pick_rank()
    send(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    send(pid, signal.SIGCONT)
    return Injected(f"SIGSTOP of rank {rank} for {PAUSE_S:g} s")


def fill_disk(target: Target) -> Injected:
    """Another process fills the disk of the checkpoints, and frees it at the first failed save or after the end."""
    mark, until_the_end = target.view.mark(), target.rng.random() < 0.5
    pids = list(target.nodes.ranks().values())
    target.disk.fill()

    def is_over() -> bool:
        if until_the_end:
            return not any(is_alive(pid) for pid in pids)
        return "failed (" in target.view.console(mark)

    what = "full disk until the run has ended" if until_the_end else "full disk until a save has failed"
    return Injected(what, is_over, target.disk.free, text="No space left on device")


def slow_store(target: Target) -> Injected:
    target.store.delay_s = 0.5
    deadline = time.monotonic() + 10
    return Injected(
        "10 s in which each read takes 0.5 s longer",
        lambda: time.monotonic() > deadline,
        lambda: setattr(target.store, "delay_s", 0.0),
    )


def hang_store(target: Target) -> Injected:
    """The store answers one node no more, or none where all have one address, until that node's ranks have ended."""
    node = target.rng.randrange(len(target.layout))
    ranks = target.nodes.ranks()
    if target.network.has_namespaces:
        ranks = {rank: pid for rank, pid in ranks.items() if target.nodes.node_of(pid) == node}
    target.store.hanging = target.network.address(node)
    return Injected(
        "a store that does not answer" + (f" node {node}" if target.network.has_namespaces else ""),
        lambda: not any(is_alive(pid) for pid in ranks.values()),
        lambda: setattr(target.store, "hanging", None),
        tuple(ranks),
        "no progress after step",
    )


def fail_reads(target: Target) -> Injected:
    target.store.errors_left = 3
    return Injected("three answers of the store are 503", lambda: target.store.errors_left == 0, text="503")


def flip_read(target: Target) -> Injected:
    target.store.flips_left = 3
    return Injected("a flipped bit in three answers of the store", lambda: target.store.flips_left == 0)


def flip_checkpoint(target: Target) -> Injected:
    """A bit flips in the newest checkpoint, and all processes are killed."""
    folders = sorted(target.disk.folder.rglob("step-????????"))
    target.nodes.kill()
    complete = sorted(folder for folder in folders if (folder / "meta.json").is_file())
    if not complete:
        return Injected("no checkpoint yet, SIGKILL of all")
    newest = complete[-1]
    file = target.rng.choice(sorted(newest.rglob("*.distcp")))
    _flip_bit(file, target.rng)
    return Injected(
        f"a flipped bit in {newest.name}/{file.parent.name}/{file.name}, SIGKILL of all", text="cannot be used"
    )


def _flip_bit(file: Path, rng: random.Random) -> None:
    with open(file, "r+b") as data:
        data.seek(position := rng.randrange(os.path.getsize(file)))
        byte = data.read(1)[0]
        data.seek(position)
        data.write(bytes([byte ^ (1 << rng.randrange(8))]))


def flip_gradient(target: Target) -> Injected:
    rank, _ = target.pick_rank()
    before = target.view.num_lines("rewinds.jsonl")
    (target.flips / f"flip-{rank}").touch()
    return Injected(
        f"a flipped bit in a gradient of rank {rank}",
        lambda: target.view.num_lines("rewinds.jsonl") > before,
        ranks=(rank,),
        text="twice, to other bits",
    )


def cut_network(target: Target) -> Injected:
    """Node 1 is cut off until its ranks have ended."""
    pids = {rank: pid for rank, pid in target.nodes.ranks().items() if target.nodes.node_of(pid) == 1}
    target.network.set_link(1, up=False)
    return Injected(
        "network of node 1 cut",
        lambda: not any(is_alive(pid) for pid in pids.values()),
        lambda: target.network.set_link(1, up=True),
        tuple(pids),
    )


def cut_briefly(target: Target) -> Injected:
    target.network.set_link(1, up=False)
    time.sleep(PAUSE_S)
    target.network.set_link(1, up=True)
    return Injected(f"network of node 1 cut for {PAUSE_S:g} s")


def edit_code(target: Target) -> Injected:
    """A harmless edit of the code that runs, which the next start takes, and SIGKILL of all processes."""
    with open(target.code / "emma_train" / "training" / "loop.py", "a") as file:
        file.write("\n# edited while a run goes on\n")
    commit = target.code / "COMMIT"
    commit.write_text(commit.read_text().strip() + "+\n")
    target.nodes.kill()
    return Injected("code edited, SIGKILL of all processes", text="the code is that of commit")


def change_ranks(target: Target) -> Injected:
    before = target.layout
    target.layout = target.rng.choice([layout for layout in LAYOUTS if layout != before])
    target.nodes.signal(signal.SIGTERM)
    return Injected(f"{sum(before)} ranks stopped, {sum(target.layout)} go on", lambda: not target.nodes.ranks())


FAULTS: dict[str, Callable[[Target], Injected]] = {
    "rank killed": kill_rank,
    "agent killed": kill_agent,
    "loader worker killed": kill_worker,
    "everything killed": kill_all,
    "stop and restart": ask_to_stop,
    "stop by one rank": ask_a_rank_to_stop,
    "rank stopped (SIGSTOP)": stop_rank,
    "loader worker stopped (SIGSTOP)": stop_worker,
    "rank paused": pause_rank,
    "full disk": fill_disk,
    "slow store": slow_store,
    "store hangs": hang_store,
    "store errors": fail_reads,
    "flipped bit of a read": flip_read,
    "flipped bit of a checkpoint": flip_checkpoint,
    "flipped bit of a gradient": flip_gradient,
    "network cut": cut_network,
    "network cut for a moment": cut_briefly,
    "code edited": edit_code,
    "other number of ranks": change_ranks,
}


def possible_kinds(target: Target) -> dict[str, str]:
    """Every kind, with the reason why it cannot be injected here; an empty text where it can."""
    needs = {"full disk": "" if target.disk.is_mounted else "may not mount a tmpfs"}
    without = "" if target.network.has_namespaces else "may not make network namespaces"
    needs |= {"network cut": without, "network cut for a moment": without}
    return {kind: needs.get(kind, "") for kind in FAULTS}
