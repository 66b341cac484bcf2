"""summary.json: what a finished stage has done, and the proof that frozen parameters did not change."""

from collections.abc import Mapping
from typing import Any

from emma_train.engine.world import World
from emma_train.stages.freeze import changed_parameters
from emma_train.stages.stage import Stage
from emma_train.training.build import TrainingParts
from emma_train.training.run_folder import RunFolder
from emma_train.training.train_state import TrainState


def finish_stage(
    run: RunFolder, world: World, stage: Stage, state: TrainState, parts: TrainingParts, frozen: Mapping[str, str]
) -> None:
    """Write summary.json before the last checkpoint; every rank calls it. `frozen`: fingerprints from the start.

    Raises RuntimeError where a frozen parameter has changed.
    """
    parts.engine.reshard()
    moved = changed_parameters(parts.engine.model, frozen)
    num_moved = world.sum([len(moved)])[0]
    if world.is_main:
        run.write_summary(summary_of(stage, state, parts, len(frozen), frozen_verified=num_moved == 0))
    if num_moved:
        raise RuntimeError(
            f"frozen parameters have changed, which is a bug: {', '.join(moved[:5]) or 'on another rank'}"
        )


def summary_of(
    stage: Stage, state: TrainState, parts: TrainingParts, num_frozen: int, frozen_verified: bool
) -> dict[str, Any]:
    """Content of summary.json."""
    return {
        "stage": stage.name,
        "title": stage.title,
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "samples": state.seen,
        "bad_samples": state.unreadable_samples,
        "replaced_samples": state.replaced_samples,
        "left_out_samples": state.dropped_samples,
        "skipped_steps": state.skipped_steps,
        "parameters": parts.num_parameters,
        "trainable": parts.trainable,
        "trainable_parameters": sum(parts.trainable.values()),
        "frozen_tensors": num_frozen,
        "frozen_verified": frozen_verified,
    }
