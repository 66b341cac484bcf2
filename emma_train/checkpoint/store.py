"""Sharded save and load of model, optimizer and EMA through torch.distributed.checkpoint, for any number of ranks."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from emma_train.checkpoint import folder as folders
from emma_train.config.errors import UserError
from emma_train.engine.protocol import Engine
from emma_train.engine.world import World


def save(
    checkpoints: Path,
    meta: dict[str, Any],
    engine: Engine,
    averages: dict[str, Tensor],
    world: World,
    keep: int,
) -> Path:
    """Write the checkpoint of meta["step"]; every rank calls it. Returns its folder."""
    step = int(meta["step"])
    if world.is_main:
        folders.begin(checkpoints, step)
    world.barrier()
    folder = checkpoints / f"{folders.step_name(step)}.tmp"
    state = {**engine.state(), "ema": dict(averages)}
    with _quiet():
        dcp.save(state, checkpoint_id=folder)
    world.barrier()
    if world.is_main:
        folders.commit(folder, meta)
        folders.prune(checkpoints, keep)
    world.barrier()
    return folder.with_suffix("")


def load_training(checkpoint: Path, engine: Engine, averages: dict[str, Tensor]) -> None:
    """Restore model, optimizer and EMA in place. Every tensor must be there; raises UserError otherwise."""
    stored = tensors(checkpoint)
    state = {**engine.state(), "ema": dict(averages)}
    wanted = {f"{part}.{name}" for part, values in state.items() for name in values}
    if missing := sorted(wanted - stored.keys()):
        raise UserError(
            f"{checkpoint}: lacks {missing[0]} and {len(missing) - 1} more; it is of another model or stage"
        )
    with _quiet():
        dcp.load(state, checkpoint_id=checkpoint)
    engine.refresh()


def load_weights(checkpoint: Path, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from stored tensors: `names` maps a weight's name to the stored tensor's, each given once."""
    state = {stored: weights[name].detach() for name, stored in names.items()}
    with _quiet():
        dcp.load(state, checkpoint_id=checkpoint)


def tensors(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all stored tensors. Raises UserError where the checkpoint cannot be read."""
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:
        raise UserError(f"{checkpoint}: cannot read the checkpoint's table of contents ({error})") from None
    return {
        name: tuple(entry.size) if hasattr(entry, "size") else ()
        for name, entry in metadata.state_dict_metadata.items()
    }


class _quiet(warnings.catch_warnings):
    """torch 2.13's checkpoint code warns about its own deprecated collectives; users can do nothing about it."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
