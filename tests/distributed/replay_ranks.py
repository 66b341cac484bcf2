"""What ranks run in tests of replays; a rank imports it by name, so it is in no test module."""

from typing import Any

from torch import Tensor

from emma_train.config.schema import Recipe
from emma_train.engine.world import join
from emma_train.objectives.loss import LossAccumulator, count
from emma_train.stages.stage import stage_of
from emma_train.training.build import build
from emma_train.training.forward import micro_loss
from tests.distributed.ranks import _autoencoder, _wake_up, make_pack, step_of


def replayed_step(recipe: Recipe, kind: str, replay: bool) -> dict[str, Any]:
    """A step over one pack, after a look at its checksums where `replay`: those, and what must have one."""
    with join("cpu", 60) as world:
        built, stage = build(recipe, stage_of(recipe), world, resuming=False), stage_of(recipe)
        _wake_up(built)
        batch = make_pack(recipe, kind)

        def compute_loss() -> Tensor:
            sums = LossAccumulator(recipe.loss, count([batch], stage.loss), world.device)
            autoencoder = _autoencoder(recipe.model.autoencoder.path)
            return micro_loss(built.engine.model, autoencoder, batch, recipe.flow, stage, sums)

        checksums = built.engine.gradient_checksums(compute_loss) if replay else {}
        trained = {name for name, weight in built.engine.weights.items() if weight.requires_grad}
        return {"checksums": checksums, "trained": trained, "step": step_of(recipe, world, built, [batch, batch])}
