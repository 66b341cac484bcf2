"""Start training in a test, and read what a run folder holds."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from emma_train.checkpoint import dcp as checkpoint_dcp
from emma_train.storage.paths import StoragePath
from emma_train.training.preemption import EXIT_PREEMPTED
from tests.distributed.ranks import command, stopped_command
from tests.distributed.spawn import Outcome, run_ranks

SAME_EVERYWHERE = ("loss", "loss/i2t", "loss/t2i", "loss/it2i", "lr", "grad_norm", "data/digest", "data/straggler",
                   "data/skipped", "data/replaced", "samples/i2t", "samples/t2i", "samples/it2i",
                   "tokens/total")  # fmt: skip
"""Metrics that are equal bit for bit in two runs of a recipe at one world size; the rest are clocks and memory."""


def train(recipe: Path, *overrides: str, processes: int = 1, code: int = 0, timeout_s: float = 180) -> list[Outcome]:
    """`emma-train train` on forked ranks; each must give the exit code. A rank's `value` is its code."""
    outcomes = run_ranks(processes, command, ["train", str(recipe), *overrides], timeout_s=timeout_s)
    for outcome in outcomes:
        assert outcome.value == code, f"exit code {outcome.value}, not {code}\n{outcome.out}\n{outcome.err}"
    return outcomes


def train_until(recipe: Path, stop: int, *overrides: str, processes: int = 1) -> None:
    """The same, but the run is asked to stop during step `stop`; it ends after a checkpoint of that step."""
    outcomes = run_ranks(processes, stopped_command, ["train", str(recipe), *overrides], stop, timeout_s=180)
    for outcome in outcomes:
        assert outcome.value == EXIT_PREEMPTED, f"exit code {outcome.value}\n{outcome.out}\n{outcome.err}"


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learnt(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without clocks and memory."""
    return [{key: line[key] for key in ("step", *SAME_EVERYWHERE) if key in line} for line in metrics(run)]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def stored(folder: StoragePath) -> dict[str, torch.Tensor]:
    """Every full tensor of a checkpoint, by name."""
    state: dict[str, Any] = {}
    for part_folder in checkpoint_dcp.dcp_folders(folder):
        entries = checkpoint_dcp.DcpReader(part_folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that there is only one process
            dcp.load(tensors, storage_reader=checkpoint_dcp.DcpReader(part_folder), no_dist=True)
        state |= tensors
    return state


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the tensors that differ between two checkpoints in any bit, or that only one has."""
    return sorted(name for name in one.keys() | other.keys() if not _equal(one.get(name), other.get(name)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other
