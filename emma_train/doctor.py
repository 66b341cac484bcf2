"""What this machine can run, and what to install for the rest: `checks` looks, `doctor` prints."""

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emma_train.engine.fp8_linear import card_has_fp8
from emma_train.training.environment import installed_version

Status = Literal["ok", "warn", "missing"]

LEAST_TORCH = (2, 11)
LEAST_SHARED_GIB = 2  # eight packs ahead of some workers and ranks
LEAST_FREE_GIB = 10  # a few checkpoints of the tiny model and a small data set

# Optional packages: import name, distribution, what needs it, extra of setup.cfg that installs it.
OPTIONAL = (
    ("deepspeed", "deepspeed", "engine.kind=deepspeed", "deepspeed"),
    ("s3fs", "s3fs", "shards from s3://", "s3"),
    ("aiohttp", "aiohttp", "shards from http(s)://", "http"),
    ("resvg_py", "resvg-py", "emma-data import of drawings", "data"),
    ("matplotlib", "matplotlib", "emma-data formulas and charts", "data"),
)
ESSENTIAL = ("transformers", "diffusers", "safetensors", "tokenizers", "omegaconf", "webdataset", "pyarrow", "wandb")


@dataclass(frozen=True)
class Check:
    """One line of the table. A machine cannot train if something is both missing and essential."""

    group: str
    name: str
    status: Status
    detail: str
    """Version or description of what there is, or why it is missing."""
    advice: str = ""
    essential: bool = False


def doctor(folder: Path = Path("runs")) -> int:
    """Print the table of all checks. Returns 0, or 1 if something essential is missing."""
    return print_checks(checks(folder), "This machine can't train yet")


def print_checks(results: list[Check], verdict: str) -> int:
    """Print a table of checks. Returns 0, or 1 after `verdict` if something essential is missing."""
    Console().print(_results_table(results))
    lacking = [check.name for check in results if check.essential and check.status == "missing"]
    if lacking:
        print(f"{verdict}: {', '.join(lacking)}.")
        return 1
    return 0


def checks(folder: Path = Path("runs")) -> list[Check]:
    """All checks, in the order of the table. `folder` is where runs are written; it need not exist."""
    return [
        *_software(),
        *_devices(),
        *_communication(),
        *_attention(),
        *(_optional(*row) for row in OPTIONAL),
        _compiler(),
        _torchvision(),
        _disk(folder),
        _shared_memory(Path("/dev/shm")),
    ]


def _results_table(results: list[Check]) -> Table:
    colour = {"ok": "green", "warn": "yellow", "missing": "red"}
    table = Table(title="emma-train doctor", title_justify="left")
    for column in ("", "check", "status", "found", "what to do"):
        table.add_column(column, overflow="fold")
    last = ""
    for check in results:
        look = colour[check.status] if check.essential or check.status != "missing" else "dim"
        group = check.group if check.group != last else ""
        table.add_row(group, check.name, f"[{look}]{check.status}[/]", escape(check.detail), escape(check.advice))
        last = check.group
    return table


def _software() -> list[Check]:
    python = sys.version_info >= (3, 11)
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    new_enough = numbers >= LEAST_TORCH
    torchrun = shutil.which("torchrun") or shutil.which("torchrun", path=str(Path(sys.executable).parent))
    lines = [
        Check(
            "software",
            "python",
            "ok" if python else "missing",
            platform.python_version(),
            "" if python else "make setup PYTHON=python3.11",
            essential=True,
        ),
        Check(
            "software",
            "torch",
            "ok" if new_enough else "missing",
            torch.__version__,
            "" if new_enough else f"needs {'.'.join(map(str, LEAST_TORCH))} or newer: make setup",
            essential=True,
        ),
        Check(
            "software",
            "torchrun",
            "ok" if torchrun else "warn",
            torchrun or "not found",
            "" if torchrun else "several processes need it: activate the environment",
        ),
    ]
    for name in ESSENTIAL:
        installed = installed_version(name)
        lines.append(
            Check(
                "software",
                name,
                "ok" if installed else "missing",
                installed or "not installed",
                "" if installed else "make setup",
                essential=True,
            )
        )
    return lines


def _devices() -> list[Check]:
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(
            Check("devices", f"cuda:{index}", "ok", f"{card.name}, {card.total_memory / 2**30:.0f} GiB", essential=True)
        )
    if cards:
        cards.append(_fp8())
    else:
        has_card = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
        advice = "this torch can't use it: install its CUDA build (rm -r .venv; make setup)" if has_card else ""
        detail = (
            "an NVIDIA GPU without its driver or CUDA torch"
            if has_card
            else "no NVIDIA GPU; the tiny recipes run on CPU"
        )
        cards.append(Check("devices", "cuda", "warn" if has_card else "missing", detail, advice))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cards.append(Check("devices", "cpu", "ok", f"{cores} cores, {memory_gib:.0f} GiB memory", essential=True))
    return cards


def _fp8() -> Check:
    """Of the first card: those of a machine are of one kind."""
    if card_has_fp8(torch.device("cuda", 0)):
        return Check("devices", "fp8", "ok", "engine.fp8 works")
    return Check("devices", "fp8", "missing", "engine.fp8 needs Ada, Hopper or a newer NVIDIA card")


def _communication() -> list[Check]:
    group = "processes"
    if not torch.distributed.is_available():
        return [
            Check(group, "torch.distributed", "missing", "not in this build of torch", "make setup", essential=True)
        ]
    gloo, nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    needs_nccl = torch.cuda.is_available()
    return [
        Check(
            group,
            "gloo",
            "ok" if gloo else "missing",
            "CPU ranks, checkpoints" if gloo else "not in torch",
            essential=True,
        ),
        Check(
            group,
            "nccl",
            "ok" if nccl else "missing",
            "GPU ranks" if nccl else "not in this build of torch",
            "install the CUDA build of torch" if needs_nccl and not nccl else "",
            essential=needs_nccl,
        ),
    ]


def _attention() -> list[Check]:
    cuda = torch.cuda.is_available()
    group, needs_cuda = "attention", "needs an NVIDIA GPU"

    def kernel(name: str, module: str, distribution: str, how: str) -> Check:
        installed = _has(module)
        if not cuda:
            return Check(group, name, "missing", needs_cuda)
        detail = installed_version(distribution) or "installed" if installed else "not installed"
        return Check(group, name, "ok" if installed else "missing", detail, "" if installed else how)

    varlen, flex = _has("torch.nn.attention.varlen"), _has("torch.nn.attention.flex_attention")
    return [
        Check(group, "sdpa", "ok", "the reference, any device", essential=True),
        Check(
            group,
            "flex",
            "ok" if flex and cuda else "missing",
            "compiled, with gradients" if flex and cuda else f"training {needs_cuda}",
        ),
        Check(
            group,
            "torch varlen",
            "ok" if varlen and cuda else "missing",
            "in torch" if varlen and cuda else needs_cuda,
        ),
        kernel(
            "flash-attn 2", "flash_attn", "flash-attn", 'pip install --no-build-isolation -e ".[flash]" (CUDA toolkit)'
        ),
        kernel(
            "flash-attn 3", "flash_attn_interface", "flash-attn-3", "Hopper; built from flash-attention's hopper folder"
        ),
        kernel("flash-attn 4", "flash_attn.cute", "flash-attn-4", 'pip install -e ".[flash4]" (Hopper, Blackwell)'),
    ]


def _optional(module: str, distribution: str, purpose: str, extra: str) -> Check:
    installed = installed_version(distribution) if _has(module) else None
    if installed:
        return Check("optional", distribution, "ok", installed)
    return Check("optional", distribution, "missing", purpose, f'pip install -c constraints.txt -e ".[{extra}]"')


def _compiler() -> Check:
    compiler = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler:
        return Check("optional", "C++ compiler", "ok", compiler)
    return Check("optional", "C++ compiler", "missing", "torch.compile on CPU, deepspeed", "apt-get install g++")


def _torchvision() -> Check:
    """Nothing here needs torchvision, but a version that does not match torch breaks all models of transformers."""
    if not _has("torchvision"):
        return Check("optional", "torchvision", "ok", "absent; not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a mismatch shows as RuntimeError, ImportError or OSError
        advice = "it breaks transformers: pip uninstall torchvision, or install the one for this torch"
        return Check("software", "torchvision", "missing", str(error), advice, essential=True)
    return Check("optional", "torchvision", "ok", installed_version("torchvision") or "installed")


def _disk(folder: Path) -> Check:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free_gib = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Check(
            "disk", str(folder), "missing", f"{existing} is not writable", "set run.root=FOLDER", essential=True
        )
    enough = free_gib >= LEAST_FREE_GIB
    return Check(
        "disk",
        str(folder),
        "ok" if enough else "warn",
        f"{free_gib:.0f} GiB free",
        "" if enough else f"less than {LEAST_FREE_GIB} GiB: free some, or set run.root=FOLDER",
    )


def _shared_memory(folder: Path) -> Check:
    """Loader workers send packs through it; Docker gives a container 64 MiB."""
    if not folder.is_dir():
        return Check("disk", str(folder), "missing", "no shared memory", "use data.workers=0")
    size_gib = shutil.disk_usage(folder).total / 2**30
    if size_gib >= LEAST_SHARED_GIB:
        return Check("disk", str(folder), "ok", f"{size_gib:.1f} GiB")
    advice = f"loader workers need {LEAST_SHARED_GIB} GiB: docker run --shm-size=16g, or use data.workers=0"
    return Check("disk", str(folder), "warn", f"{size_gib * 1024:.0f} MiB", advice)


def _has(module: str) -> bool:
    """Whether a module exists, without importing it; its parent package is imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError, RuntimeError, OSError):
        return False
