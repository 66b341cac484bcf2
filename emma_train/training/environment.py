"""environment.json: where, when and with which versions a run was made."""

import os
import platform
import socket
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emma_train.config.secrets import without_secrets

if TYPE_CHECKING:
    from emma_train.engine.world import World

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "deepspeed",
    "flash-attn",
    "webdataset",
    "safetensors",
    "numpy",
    "wandb",
)


def environment(world: "World") -> dict[str, Any]:
    """Content of environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "command": without_secrets(" ".join(sys.argv)),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "host": socket.gethostname(),
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": code_versions()["package_versions"],
    }


def code_versions() -> dict[str, Any]:
    """Commit and versions of packages, with the names that lm-eval gives them."""
    versions = {name: v for name in PACKAGES if (v := installed_version(name))}
    return {"git_hash": commit(), "package_versions": versions}


@cache
def commit() -> str | None:
    """Git commit of the code, followed by + if files outside docs/ have changed; None outside of a checkout.

    A job runs a copy of the code, which has its commit in a file (launchers/snapshot.py).
    """
    here = Path(__file__).parent
    copied = here.parents[1] / "COMMIT"
    if copied.is_file():
        return copied.read_text().strip() or None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        # Results in docs/ change while the runs that make them are under way.
        words = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)docs"]
        dirty = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip()[:12] + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} CPU"


def installed_version(distribution: str) -> str | None:
    """Version of an installed package, by the name that pip knows; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
