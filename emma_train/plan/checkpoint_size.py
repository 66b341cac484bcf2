"""Bytes of checkpoints, and of host memory while one is written."""

from dataclasses import dataclass

from emma_train.plan.arithmetic import Plan

WRITE_BYTES_S = 2e9
"""Assumed speed of the storage for all ranks together."""


@dataclass(frozen=True)
class CheckpointSize:
    """Of one stage."""

    checkpoint: float
    """Bytes of one checkpoint: fp32 weights and optimizer state of what trains, and its average."""
    frozen: float
    """Bytes of what never changes, written once."""
    keep: int

    @property
    def total(self) -> float:
        """Bytes of the checkpoints that are kept, and of one that is being written."""
        return (self.keep + 1) * self.checkpoint + self.frozen

    @property
    def write_s(self) -> float:
        return self.checkpoint / WRITE_BYTES_S


def checkpoint_size(plan: Plan) -> CheckpointSize:
    """What train.save_every writes."""
    sizes, recipe = plan.sizes, plan.recipe
    moments = 8 * (sizes.trained - sizes.muon) + 4 * sizes.muon
    average = 4 * sizes.trained if recipe.ema.decay else 0
    return CheckpointSize(4 * sizes.trained + moments + average, 4 * (sizes.stored - sizes.trained), recipe.train.keep)
