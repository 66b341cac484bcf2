"""What the loop asks of an engine; the only seam between training and sharding."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

MakeOptimizer = Callable[[Mapping[str, Tensor]], torch.optim.Optimizer]
"""An optimizer over plain tensors by parameter name; `lr_scale` of each of its groups multiplies the step's learning
rate."""


class Engine(Protocol):
    """A sharded model with its optimizer. It is made with values that mean nothing: write `weights`, then `refresh`."""

    model: nn.Module
    """Call it for a forward pass; parameters may be shards."""
    groups: list[dist.ProcessGroup]
    """Of its collectives, beside the default group."""
    weights: dict[str, Tensor]
    """fp32 value of every parameter, of which a rank holds its part (engine/fragment.py). Reading and writing them
    needs no communication."""

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; gradients are summed over ranks by the last one of the step."""

    def step(self, lr: float) -> float:
        """Clip to optimizer.clip, update, forget the gradients; returns the global gradient norm before clipping.

        Where the norm is not finite nothing moves but the gradients, which are forgotten.
        """

    def sync_compute_weights(self) -> None:
        """After `weights` were written: have the model compute with them."""

    def reshard(self) -> None:
        """Before the model's own parameters are read: give up gathered copies of them."""

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds: `model` by parameter name, and `optimizer` by names that all engines share.

        Tensors are the engine's own memory: loading into them, and then `refresh`, goes on from a checkpoint.
        """

    def close(self) -> None:
        """After the last step: let go of what would outlive the engine."""
