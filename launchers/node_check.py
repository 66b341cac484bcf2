"""Whether a node can take part in a round: what is measured of it, and the rule that says what is wrong."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 20.0
"""Seconds for the check of a node; where it takes longer, something hangs."""
DISK_SKEW_S = 5.0
"""Of the node's clock against the disk of the run folder."""
LEAST_DISK_GIB = 1.0
DEVICE_QUERY = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")
DEVICE_WORK = (
    "import sys, torch\n"
    "for index in range(int(sys.argv[1])):\n"
    "    ones = torch.ones(512, 512, device=f'cuda:{index}')\n"
    "    assert bool(((ones @ ones) == 512).all()), f'GPU {index} computes wrongly'\n"
)


@dataclass(frozen=True)
class NodeFacts:
    """What is measured of a node. None: cannot be read here, which is no problem."""

    free_gib: float | None = None
    """Of the disk of the run folder."""
    skew_s: float | None = None
    write_error: str = ""
    num_devices: int | None = None
    device_values: Sequence[Sequence[str]] = ()
    """Values of DEVICE_QUERY of each GPU, as nvidia-smi prints them."""
    work_error: str = ""
    """Last line of a product of matrices on each GPU, where it failed."""


def node_problems(facts: NodeFacts, num_devices: int) -> list[str]:
    """What is wrong with a node that must have `num_devices` GPUs; empty where it is well."""
    problems = [facts.write_error] if facts.write_error else []
    if facts.free_gib is not None and facts.free_gib < LEAST_DISK_GIB:
        problems.append(f"{facts.free_gib:.2f} GiB free in the run folder, fewer than {LEAST_DISK_GIB:g}")
    if facts.skew_s is not None and abs(facts.skew_s) > DISK_SKEW_S:
        problems.append(f"its clock differs by {facts.skew_s:.1f} s from that of the run folder's disk")
    if facts.num_devices is not None and facts.num_devices < num_devices:
        problems.append(f"{facts.num_devices} GPUs of {num_devices}")
    for index, (errors, pending, failure) in enumerate(facts.device_values):
        if errors.isdecimal() and int(errors):
            problems.append(f"GPU {index} has {errors} uncorrected ECC errors")
        if pending == "Yes":
            problems.append(f"GPU {index} waits for a reset to remap rows of its memory")
        if failure == "Yes":
            problems.append(f"GPU {index} could not remap rows of its memory")
    return [*problems, facts.work_error] if facts.work_error else problems


def check_node(run: Path, num_devices: int, limit_s: float = LIMIT_S) -> list[str]:
    """Measure this node, for at most `limit_s`. Returns what is wrong with it."""
    disk: list[NodeFacts] = []
    # A disk that hangs blocks its thread for good; that must not block the agent.
    thread = threading.Thread(target=lambda: disk.append(_disk_facts(run)), name="node check", daemon=True)
    thread.start()
    devices = _device_facts(num_devices, limit_s) if num_devices else NodeFacts()
    thread.join(limit_s)
    facts = disk[0] if disk else NodeFacts(write_error=f"{run} does not answer in {limit_s:g} s")
    return [*node_problems(facts, 0), *node_problems(devices, num_devices)]


def node_name() -> str:
    """The name of this node as its cluster knows it."""
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _disk_facts(run: Path) -> NodeFacts:
    path = run / "logs" / f".node-check-{node_name()}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        skew_s = time.time() - path.stat().st_mtime
        path.unlink()
        return NodeFacts(free_gib=shutil.disk_usage(run).free / 2**30, skew_s=skew_s)
    except OSError as error:
        return NodeFacts(write_error=f"{run} cannot be written ({error.strerror})")


def _device_facts(num_devices: int, limit_s: float) -> NodeFacts:
    """Ends within `limit_s`."""
    end = time.monotonic() + limit_s
    query = ["nvidia-smi", f"--query-gpu={','.join(DEVICE_QUERY)}", "--format=csv,noheader"]
    count, values = None, []
    try:
        listed = subprocess.run(query[:1] + ["-L"], capture_output=True, text=True, timeout=limit_s / 2, check=False)
        if listed.returncode == 0:
            count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        asked = subprocess.run(query, capture_output=True, text=True, timeout=limit_s / 4, check=False)
        rows = [[word.strip() for word in line.split(",")] for line in asked.stdout.splitlines()]
        values = [row for row in rows if len(row) == len(DEVICE_QUERY)] if asked.returncode == 0 else []
    except OSError:
        pass  # no nvidia-smi: the work below says whether the GPUs are usable
    except subprocess.TimeoutExpired:
        return NodeFacts(work_error="nvidia-smi does not answer")
    work = [sys.executable, "-c", DEVICE_WORK, str(num_devices)]
    try:
        done = subprocess.run(
            work, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic()), check=False
        )
        error = (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"a product of matrices on its GPUs takes more than {limit_s:g} s"
    return NodeFacts(num_devices=count, device_values=values, work_error=error)
