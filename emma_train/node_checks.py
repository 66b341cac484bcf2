"""What the nodes of a job can do together: `emma-train doctor --nodes` under torchrun or srun.

Every rank measures, the main rank prints one table.
"""

import os
import platform
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emma_train.doctor import LEAST_SHARED_GIB, Check
from emma_train.engine.world import FEWEST_FILES, World
from emma_train.training.environment import commit

LARGEST_SKEW_S = 5.0
"""Clocks that differ by more confuse logs, locks and caches."""
REPEATS = 5
GROUP = "nodes"


def check_nodes(world: World, folder: Path, megabytes: int) -> list[Check]:
    """All checks; every rank calls it. folder: where runs are written; megabytes: the size of an all-reduce."""
    facts = world.gather(node_facts())
    return [
        Check(GROUP, "ranks", "ok", _ranks(facts)),
        *(_same(facts, name) for name in ("python", "torch", "commit")),
        _devices(facts),
        _clocks(world),
        _shared_folder(world, folder),
        _least(facts, "/dev/shm free, GiB", LEAST_SHARED_GIB, "give the container more shared memory"),
        _least(facts, "open files", FEWEST_FILES, f"ulimit -n {FEWEST_FILES} in the job"),
        _collectives(world, megabytes),
    ]


def node_facts() -> dict[str, Any]:
    """What one rank sees of its node."""
    memory = Path("/dev/shm")
    return {
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit() or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "/dev/shm free, GiB": shutil.disk_usage(memory).free / 2**30 if memory.is_dir() else 0.0,
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _ranks(facts: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for fact in facts:
        counts[fact["host"]] = counts.get(fact["host"], 0) + 1
    return f"{len(facts)} on " + ", ".join(f"{host} ({count})" for host, count in counts.items())


def _same(facts: Sequence[dict[str, Any]], name: str) -> Check:
    """All nodes have the same version."""
    hosts: dict[str, set[str]] = {}
    for fact in facts:
        hosts.setdefault(str(fact[name]), set()).add(fact["host"])
    if len(hosts) == 1:
        return Check(GROUP, name, "ok", next(iter(hosts)))
    detail = "; ".join(f"{value} on {', '.join(sorted(on))}" for value, on in hosts.items())
    return Check(GROUP, name, "missing", detail, "install the same on all nodes", essential=True)


def _devices(facts: Sequence[dict[str, Any]]) -> Check:
    kinds = {fact["device"] for fact in facts}
    advice = "the slowest kind sets the pace" if len(kinds) > 1 else ""
    return Check(GROUP, "devices", "warn" if advice else "ok", ", ".join(sorted(kinds)), advice)


def _least(facts: Sequence[dict[str, Any]], name: str, needed: float, advice: str) -> Check:
    """The node that has least of something has enough."""
    least = min(facts, key=lambda fact: fact[name])
    enough = least[name] >= needed
    detail = f"at least {least[name]:,.0f}, on {least['host']}"
    return Check(GROUP, name, "ok" if enough else "warn", detail, "" if enough else advice)


def _clocks(world: World) -> Check:
    """Clocks, read right after all ranks have met."""
    dist.barrier(group=world.host_group)
    now = world.gather(time.time())
    skew = max(now) - min(now)
    late = skew > LARGEST_SKEW_S
    advice = "let the nodes take their time from one server (chrony, NTP)" if late else ""
    return Check(GROUP, "clocks", "warn" if late else "ok", f"differ by {skew:.3f} s", advice)


def _shared_folder(world: World, folder: Path) -> Check:
    """A file that the main rank writes is seen by all ranks."""
    name = f".doctor-{uuid.uuid4().hex}" if world.is_main else ""
    name = max(world.gather(name))
    problem = ""
    try:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    problem = world.gather(problem)[0]
    sees = world.gather((os.environ.get("SLURMD_NODENAME", socket.gethostname()), (folder / name).is_file()))
    blind = sorted({host for host, is_seen in sees if not is_seen})
    dist.barrier(group=world.host_group)
    if world.is_main:
        (folder / name).unlink(missing_ok=True)
    problem = problem or (f"not seen by {', '.join(blind)}" if blind else "")
    advice = "put run.root on a disk that all nodes see" if problem else ""
    detail = f"{folder.resolve()}: {problem or 'seen by all'}"
    return Check(GROUP, "run folder", "missing" if problem else "ok", detail, advice, essential=True)


def _collectives(world: World, megabytes: int) -> Check:
    """Sum and time of an all-reduce over all ranks; the first one also opens the connections."""
    if world.size == 1:
        return Check(GROUP, "all-reduce", "warn", "one rank: nothing to measure", "start it with torchrun or srun")
    values = torch.full((megabytes * 2**18,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)
    expected = world.size * (world.size + 1) / 2
    wrong = world.sum([float((values != expected).any())])[0] > 0
    values.zero_()
    seconds = min(_timed(lambda: dist.all_reduce(values), world) for _ in range(REPEATS))
    bus = 2 * (world.size - 1) / world.size * values.numel() * 4 / seconds / 1e9
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    detail = f"{megabytes} MiB over {backend} in {1e3 * seconds:.1f} ms: {bus:.2f} GB/s of bus bandwidth"
    if wrong:
        return Check(
            GROUP, "all-reduce", "missing", "gave a wrong sum", "look for a faulty card or link", essential=True
        )
    return Check(GROUP, "all-reduce", "ok", detail)


def _timed(call: Callable[[], Any], world: World) -> float:
    """Seconds of the slowest rank."""
    started = time.perf_counter()
    call()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return max(world.gather(time.perf_counter() - started))
