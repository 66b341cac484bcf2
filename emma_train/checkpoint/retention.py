"""Which checkpoints stay: the last few, every n-th step for good, and the best by a metric. Never none."""

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from emma_train.checkpoint import folder as folders
from emma_train.config.schema import TrainConfig
from emma_train.errors import RunError
from emma_train.storage import paths as places
from emma_train.storage.paths import StoragePath

log = logging.getLogger(__name__)


def kept(steps: Mapping[int, float | None], last: int, every: int) -> set[int]:
    """Steps whose checkpoints stay. `steps` are those of whole checkpoints, with the value of the metric (lower is
    better) where they have one; `last` counts the newest, and `every` 0 keeps none for good."""
    newest = sorted(steps, reverse=True)[: max(1, last)]
    for_good = [step for step in steps if every and step % every == 0]
    measured = {step: value for step, value in steps.items() if value is not None and math.isfinite(value)}
    best = [min(measured, key=lambda step: (measured[step], -step))] if measured else []
    return {*newest, *for_good, *best}


def prune(checkpoints: StoragePath, config: TrainConfig) -> None:
    """Remove checkpoints that need not stay, what crashes left behind, and frozen weights that no checkpoint needs.

    What cannot be removed is named in a warning and left. Raises RunError where a store does not say what is there."""
    # A torn folder must not count: it would push out the whole one that a run resumes from.
    metas = {folder: meta for folder in folders.steps(checkpoints) if (meta := folders.whole(folder)) is not None}
    values = {m["step"]: m.get("metrics", {}).get(config.keep_best) for m in metas.values()}
    stay = kept(values, config.keep, config.keep_every)
    metas = {folder: meta for folder, meta in metas.items() if meta["step"] in stay}
    if not metas:
        return
    newest = max(stay)
    for folder in places.children(checkpoints):
        if not folder.name.startswith("step-"):
            continue
        step, _, suffix = folder.name.removeprefix("step-").partition(".")
        # What was set aside as damaged can be looked at until a newer checkpoint is there.
        if suffix in ("tmp", "removed") or (folder not in metas and step.isdigit() and int(step) < newest):
            _remove(folder)
    needed = {meta.get("frozen") for meta in metas.values()}
    for folder in places.children(checkpoints / folders.FROZEN):
        if folder.name not in needed:
            _remove(folder)


def _remove(folder: StoragePath) -> None:
    try:
        if folder.suffix and isinstance(folder, Path):
            shutil.rmtree(folder)
        else:
            folders.remove(folder)
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", folder, error.strerror)
    except RunError as error:
        log.warning("%s cannot be removed: %s", folder.name, error)
