"""The run folder: what is written before step 0, beside the metrics, and at the end."""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emma_train.checkpoint import folder as folders
from emma_train.config import config_hash, to_yaml
from emma_train.config.load import as_dict
from emma_train.config.renamed import with_current_names
from emma_train.config.schema import Recipe
from emma_train.engine.world import World
from emma_train.errors import RunError, UserError
from emma_train.sequence.step_batches import UnreadableSample
from emma_train.storage import paths as places
from emma_train.storage.files import write_atomic

log = logging.getLogger(__name__)
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
CHANGEABLE = (
    "run.",
    "train.",
    "tracker.",
    "engine.",
    "attention.",
    "init.",
    "ema.device",
    "resume.",
    "data.workers",
    "data.prefetch",
    "data.max_bad_samples",
    "data.cache_",
    "data.read_",
)
"""What may differ when a run is resumed: it does not change what is learnt from which data."""


class RunFolder:
    """Paths of one run. Raises UserError where no installed package opens train.checkpoints."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = Path(recipe.run.root) / recipe.run.name
        self.config = self.path / "config.yaml"
        root = recipe.train.checkpoints
        self.checkpoints = places.of(root) / recipe.run.name if root else self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.skipped_steps = self.path / "skipped_steps.jsonl"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:08d}"

    def check_checkpoints(self, world: World) -> None:
        """Every rank calls it. Raises UserError or RunError on all where one of them cannot write checkpoints."""
        found: Exception | None = None
        try:
            places.check(self.checkpoints, f"probe-{world.rank}")
        except (UserError, RunError) as error:
            found = type(error)(f"train.checkpoints: {error}")
        for trouble in world.gather(found):
            if trouble is not None:
                raise trouble

    def check_new(self) -> None:
        """Raise UserError where the run is about to begin anew though it has checkpoints: where train.checkpoints said
        when it was last started."""
        former = folders.of_run(self.path)
        if former != self.checkpoints and folders.steps(former):
            raise UserError(
                f"train.checkpoints: {self.path} has its checkpoints in {former}, and there are none in "
                f"{self.checkpoints}; copy them there or put train.checkpoints back, or choose another run.name"
            )

    def prepare(self, recipe: Recipe, world: World) -> None:
        """Write the resolved recipe and the environment; main rank only. Raises UserError where the disk refuses."""
        try:
            for folder in (self.checkpoints, self.path / "logs"):
                if isinstance(folder, Path):
                    folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, f"# hash {config_hash(recipe)}\n{to_yaml(recipe)}")
            write_atomic(self.path / "environment.json", json.dumps(environment(world), indent=1) + "\n")
        except OSError as error:
            keys = "run.root or train.checkpoints" if recipe.train.checkpoints else "run.root"
            raise UserError(
                f"{error.filename or self.path}: cannot write the run folder ({error.strerror}); set {keys}"
            ) from None

    def write_summary(self, values: dict[str, Any]) -> None:
        """Write summary.json. Where storage refuses it a warning says so, as with what follows: training goes on."""
        try:
            write_atomic(self.summary, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.summary, error.strerror)

    def append_bad(self, step: int, bad: list[UnreadableSample]) -> None:
        """Add unreadable samples to bad_samples.jsonl; main rank only."""
        try:
            with open(self.bad_samples, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **asdict(item)}) + "\n" for item in bad)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.bad_samples, error.strerror)

    def forget_bad(self, after: int) -> None:
        """Drop unreadable samples of steps that will be done again, and a line that a crash tore; main rank only."""
        if not self.bad_samples.exists():
            return
        kept = []
        for line in self.bad_samples.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= after:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        try:
            write_atomic(self.bad_samples, "".join(kept))
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.bad_samples, error.strerror)

    def append_skipped(self, step: int, rank: int, norm: float, keys: list[str]) -> None:
        """Add a rank's samples of a step whose gradient was not finite to skipped_steps.jsonl."""
        with open(self.skipped_steps, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rank": rank, "grad_norm": str(norm), "keys": keys}) + "\n")


def environment(world: World) -> dict[str, Any]:
    """Where and with what a run was made."""
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "host": socket.gethostname(),
        "world_size": world.size,
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }


def contradictions(recipe: Recipe, stored: dict[str, Any]) -> list[str]:
    """Recipe fields that differ from a checkpoint's config and matter to what is learnt, with both values."""
    mine, theirs = _flat(as_dict(recipe)), _flat(with_current_names(stored))
    found = []
    for key in sorted(mine.keys() | theirs.keys()):
        allowed = key.startswith(CHANGEABLE) or any(key == a or key.startswith(f"{a}.") for a in recipe.resume.allow)
        if not allowed and mine.get(key) != theirs.get(key):
            found.append(f"{key} is {mine.get(key)!r} in the recipe and {theirs.get(key)!r} in the checkpoint")
    return found


def commit() -> str | None:
    """Git commit of the code, with + where it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip()[:12] + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} CPU"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
