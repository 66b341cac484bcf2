"""meta.json of a checkpoint: what it is, and what a resume needs beside the tensors."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from emma_train.config import config_hash
from emma_train.config.load import to_stored
from emma_train.config.schema import Recipe
from emma_train.export.content import CONTENT
from emma_train.training.build import TrainingParts
from emma_train.training.environment import commit
from emma_train.training.train_state import TrainState


def checkpoint_meta(
    recipe: Recipe,
    parts: TrainingParts,
    state: TrainState,
    losses: Sequence[Mapping[str, float]],
    validated: Mapping[str, float],
    *,
    data_state: dict[str, Any],
    tracker_run: str | None,
    parent: dict[str, Any] | None,
    content: Mapping[str, str],
    world_size: int,
) -> dict[str, Any]:
    """`losses`: those of every logged step since the last checkpoint, of which the means are kept. `validated`: values
    of the validation after this step, if it had one."""
    names = sorted({name for values in losses for name in values})
    logged = {name: [values[name] for values in losses if name in values] for name in names}
    return {
        "step": state.step,
        "stage": recipe.stage.name,
        "trainable": parts.trainable,
        "config_hash": config_hash(recipe),
        "config": to_stored(recipe),
        "ema_decay": recipe.ema.decay,
        "done": asdict(state),
        "metrics": {**{name: sum(values) / len(values) for name, values in logged.items()}, **validated},
        "data": data_state,
        "tracker_run": tracker_run,
        "parent": parent,
        CONTENT: dict(content),
        "world_size": world_size,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
