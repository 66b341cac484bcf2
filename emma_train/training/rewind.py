"""A rewind: back to the newest checkpoint before a spike of the loss, and on without the steps that led to it.

The trainer writes a line to rewinds.jsonl and ends; the stage then starts again as after a crash. All that a start
needs is in that file, so a kill at any moment changes nothing.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from emma_train.checkpoint import folder as folders
from emma_train.config.schema import HealthConfig
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.monitor.trackers import read_jsonl
from emma_train.sequence.step_batches import StepBatches
from emma_train.storage.paths import storage_of
from emma_train.training.run_folder import RunFolder
from emma_train.training.skip_windows import Windows, is_inside, merged

log = logging.getLogger(__name__)
REWIND = -1
"""What Trainer.train returns, in the place of an exit code, where the stage must start again after a rewind."""


class Rewinds:
    """Decides on rewinds. Every rank has one and calls it at the same steps with the same losses."""

    def __init__(self, run: RunFolder, world: World, config: HealthConfig, step: int) -> None:
        """`step`: the last one that is done."""
        self._run = run
        self._world = world
        self._config = config
        self._recent: deque[tuple[int, list[str]]] = deque()
        """Step and sample keys of this rank since the last logged step, and of skip_before steps before it."""
        self._last_logged = step

    def note(self, data: StepBatches) -> None:
        """Keep the sample keys of a step for as long as a rewind may skip it."""
        if self._config.spike != "rewind":
            return
        self._recent.append((data.step, [key for batch in data.packs for key in batch.keys]))
        while self._recent[0][0] <= self._last_logged - self._config.skip_before:
            self._recent.popleft()

    def after_logged(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the stage must start again; every rank calls it after each logged step with its metrics. Writes
        rewinds.jsonl."""
        previous, self._last_logged = self._last_logged, step
        if not values.get("health/spike") or self._config.spike != "rewind":
            return False
        num_before = len(self._world.on_main(lambda: read_rewinds(self._run)))
        if num_before >= self._config.max_rewinds:
            log.warning("step %d: no rewind, for there were %d (health.max_rewinds)", step, num_before)
            return False
        first = max(1, previous + 1 - self._config.skip_before)
        keys: dict[int, list[str]] = {}
        # Ranks that share a pack all have its keys.
        for of_rank in self._world.gather(list(self._recent))[:: self._world.sp_size]:
            for number, names in of_rank:
                keys.setdefault(number, []).extend(names)
        line = {"first": first, "last": step, "loss": values["loss"], "time_unix": time.time(), "keys": keys}
        self._world.on_main(lambda: self._write(line))
        log.warning("step %d: rewind %d; steps %d to %d are skipped", step, num_before + 1, first, step)
        return True

    def after_mismatch(self, step: int, mismatches: Sequence[str]) -> None:
        """Note what a replay says (one line for each rank that computed wrongly), in rewinds.jsonl too. The stage must
        start again; every rank calls it. Raises RunError after health.max_rewinds of them."""
        text = "; ".join(mismatches)
        num_before = self._world.on_main(lambda: sum("mismatches" in line for line in _read(self._run)))
        if num_before >= self._config.max_rewinds:
            raise RunError(
                f"step {step}: {text}; this was so {num_before} times before (health.max_rewinds). Exclude that node, "
                "or set health.replay=0 if its kernels do not repeat their bits"
            )
        line = {"step": step, "mismatches": list(mismatches), "time_unix": time.time()}
        self._world.on_main(lambda: self._write(line))
        log.warning("step %d: %s; back to the newest checkpoint, nothing is skipped", step, text)

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with open(self._run.rewinds, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(line))
        except OSError as error:
            raise RunError(f"{self._run.rewinds}: cannot be written ({error.strerror}), so no rewind") from None


def read_rewinds(run: RunFolder) -> Windows:
    """The window of each rewind, in the order in which they were."""
    return [[line["first"], line["last"]] for line in _read(run) if {"first", "last"} <= line.keys()]


def _read(run: RunFolder) -> list[dict[str, Any]]:
    return read_jsonl(run.rewinds) if run.rewinds.is_file() else []


def set_aside_rewound(run: RunFolder) -> None:
    """Rename the checkpoints that trained what a rewind skips, so that no start takes them; main rank only."""
    if not (rewinds := read_rewinds(run)):
        return
    for folder in folders.list_steps(run.checkpoints):
        if has_trained(rewinds, folders.read_meta(folder) or {}):
            log.warning("%s is after a spike: set aside as %s", folder, storage_of(folder).set_aside(folder).name)


def has_trained(rewinds: Windows, meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with the metadata `meta` has trained what a rewind skips."""
    step, skipped = meta.get("step", 0), merged(meta.get("done", {}).get("skip_windows", []))
    return any(first <= step and not is_inside(first, skipped) for first, _ in rewinds)
