"""The run folder: its paths, and the files that training writes beside metrics and checkpoints."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.local_folder import local_folder
from emma_train.config import config_hash, to_yaml
from emma_train.config.schema import Recipe
from emma_train.engine.world import World
from emma_train.errors import RunError, UserError
from emma_train.monitor.run_state import DIGESTS_FILE, STARTS_FILE
from emma_train.sequence.step_batches import UnreadableSample
from emma_train.storage.files import write_atomic
from emma_train.storage.paths import parse_path, storage_of
from emma_train.training.environment import environment

log = logging.getLogger(__name__)


class RunFolder:
    """Paths of one run. Raises UserError where no installed package can open train.checkpoints."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = Path(recipe.run.root) / recipe.run.name
        self.config = self.path / "config.yaml"
        root = recipe.train.checkpoints
        self.checkpoints = parse_path(root) / recipe.run.name if root else self.path / "checkpoints"
        local = recipe.train.local_folder
        self.local_checkpoints = local_folder(local, recipe.run.name, self.checkpoints) if local else None
        """Folder of this node for local checkpoints."""
        self.metrics = self.path / "metrics.jsonl"
        self.rewinds = self.path / "rewinds.jsonl"
        self.digests = self.path / DIGESTS_FILE
        self.summary = self.path / "summary.json"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.skipped_steps = self.path / "skipped_steps.jsonl"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / f"step-{step:08d}"

    def check_checkpoints(self, world: World) -> None:
        """Every rank calls it. Raises UserError or RunError on all ranks if one of them cannot write checkpoints."""
        problem: Exception | None = None
        try:
            storage_of(self.checkpoints).check_writable(self.checkpoints, f"probe-{world.rank}")
        except (UserError, RunError) as error:
            problem = type(error)(f"train.checkpoints: {error}")
        for of_rank in world.gather(problem):
            if of_rank is not None:
                raise of_rank

    def check_new(self) -> None:
        """Raise UserError if the run would start from step 0 although it has checkpoints in another folder: that of
        train.checkpoints when the run was last started."""
        former = folders.checkpoints_of_run(self.path)
        if former != self.checkpoints and folders.list_steps(former):
            raise UserError(
                f"train.checkpoints: {self.path} has its checkpoints in {former}, and there are none in "
                f"{self.checkpoints}; copy them there or put train.checkpoints back, or choose another run.name"
            )

    def prepare(self, recipe: Recipe, world: World, step: int) -> None:
        """Write the resolved recipe, the environment and a line about this start after `step`; main rank only. Logs
        which steps are computed again.

        Raises UserError where that fails.
        """
        if (last := self._last_step()) > step:
            log.warning("steps %d to %d are computed again: the checkpoint is of step %d", step + 1, last, step)
        try:
            storage_of(self.checkpoints).make_folder(self.checkpoints, parents=True)
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, f"# hash {config_hash(recipe)}\n{to_yaml(recipe)}")
            surroundings = environment(world)
            write_atomic(self.path / "environment.json", json.dumps(surroundings, indent=1) + "\n")
            start = {"time_unix": time.time(), "step": step, "job": os.environ.get("SLURM_JOB_ID")}
            start |= {key: surroundings[key] for key in ("world_size", "host", "commit")}
            with open(self.path / STARTS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(start) + "\n")
        except OSError as error:
            keys = "run.root or train.checkpoints" if recipe.train.checkpoints else "run.root"
            raise UserError(
                f"{error.filename or self.path}: cannot write the run folder ({error.strerror}); set {keys}"
            ) from None

    def write_summary(self, values: dict[str, Any]) -> None:
        """Write summary.json. A failure is logged as a warning and does not stop training, here and below."""
        try:
            write_atomic(self.summary, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.summary, error.strerror)

    def append_unreadable(self, step: int, samples: list[UnreadableSample]) -> None:
        """Add unreadable samples to bad_samples.jsonl; main rank only."""
        try:
            with open(self.bad_samples, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **asdict(sample)}) + "\n" for sample in samples)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.bad_samples, error.strerror)

    def forget_unreadable(self, after: int) -> None:
        """Remove the samples of steps that will run again, and incomplete lines; main rank only."""
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

    def append_digests(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the digests of some steps to digests.jsonl; main rank only. Nothing is ever removed from it."""
        try:
            with open(self.digests, "a", encoding="utf-8") as file:
                # The line feed comes first, so that a line that a crash cut off does not spoil the next one.
                file.writelines("\n" + json.dumps(record) for record in records)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.digests, error.strerror)

    def _last_step(self) -> int:
        """The last step in digests.jsonl; 0 where there is none."""
        try:
            with open(self.digests, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                line = file.read().splitlines()[-1]
            return int(json.loads(line)["step"])
        except (OSError, IndexError, ValueError, KeyError, TypeError):
            return 0

    def append_skipped(self, step: int, rank: int, norm: float, keys: list[str]) -> None:
        """Add a rank's samples of a step whose gradient was not finite to skipped_steps.jsonl."""
        try:
            with open(self.skipped_steps, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rank": rank, "grad_norm": str(norm), "keys": keys}) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.skipped_steps, error.strerror)
