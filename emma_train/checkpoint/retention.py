"""Which checkpoints are kept: the last few, every n-th step, and the best by a metric. The newest is always kept."""

import logging
import math
from collections.abc import Mapping

from emma_train.checkpoint import folder as folders
from emma_train.config.schema import ANSWER_METRICS, TrainConfig
from emma_train.errors import RunError
from emma_train.storage.paths import StoragePath, storage_of

log = logging.getLogger(__name__)


def steps_to_keep(steps: Mapping[int, float | None], last: int, every: int) -> set[int]:
    """Steps whose checkpoints are kept. `steps` are those of valid checkpoints, with the value of the metric (lower is
    better) where they have one. `last` is how many of the newest are kept; `every` keeps the steps that it divides,
    none where it is 0."""
    newest = sorted(steps, reverse=True)[: max(1, last)]
    divisible = [step for step in steps if every and step % every == 0]
    measured = {step: value for step, value in steps.items() if value is not None and math.isfinite(value)}
    best = [min(measured, key=lambda step: (measured[step], -step))] if measured else []
    return {*newest, *divisible, *best}


def lower_is_better(name: str, metrics: Mapping[str, float]) -> float | None:
    """The value of a metric, negative where more is better; None where there is none."""
    value = metrics.get(name)
    return -value if value is not None and name in ANSWER_METRICS else value


def prune(checkpoints: StoragePath, config: TrainConfig) -> None:
    """Remove checkpoints that need not be kept, what crashes left, and frozen weights that no checkpoint refers to.

    What cannot be removed is named in a warning and left. Raises StorageError where an object store fails to list."""
    # A torn folder must not count: it would replace the valid one that a run resumes from.
    metas = {
        folder: meta
        for folder in folders.list_steps(checkpoints)
        if (meta := folders.read_valid_meta(folder)) is not None
    }
    values = {m["step"]: lower_is_better(config.keep_best, m.get("metrics", {})) for m in metas.values()}
    kept = steps_to_keep(values, config.keep, config.keep_every)
    metas = {folder: meta for folder, meta in metas.items() if meta["step"] in kept}
    if not metas:
        return
    storage = storage_of(checkpoints)
    for folder in storage.listdir(checkpoints):
        if not folder.name.startswith("step-"):
            continue
        step, _, suffix = folder.name.removeprefix("step-").partition(".")
        # A damaged checkpoint that was set aside can be inspected until there is a newer checkpoint.
        is_older = step.isdigit() and int(step) < max(kept)
        if suffix in ("tmp", "removed") or (folder not in metas and is_older):
            _remove(folder)
    needed = {meta.get("frozen") for meta in metas.values()}
    for folder in storage.listdir(checkpoints / folders.FROZEN):
        if folder.name not in needed:
            _remove(folder)


def _remove(folder: StoragePath) -> None:
    try:
        storage_of(folder).remove(folder)
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", folder, error.strerror)
    except RunError as error:
        log.warning("%s cannot be removed: %s", folder.name, error)
