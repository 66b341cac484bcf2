"""The protocol between training and sharding: everything that the rest of the trainer calls on an engine."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

MakeOptimizer = Callable[[Mapping[str, Tensor]], torch.optim.Optimizer]
"""Makes an optimizer over plain tensors by parameter name. The `lr_scale` of each of its groups multiplies the learning
rate of the step."""


class Engine(Protocol):
    """A sharded model with its optimizer.

    Parameters are uninitialised after construction: fill `weights`, then call `sync_compute_weights`.
    """

    model: nn.Module
    """Call it for a forward pass. Its parameters may be shards."""
    groups: list[dist.ProcessGroup]
    """Process groups of the engine's collectives, without the default group."""
    weights: dict[str, Tensor]
    """fp32 values of every parameter by name; a rank holds its shards (engine/flat_shard.py). Reading and writing them
    needs no communication."""

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward pass of one micro-batch. The last one of a step (`last`) sums the gradients over ranks."""

    def step(self, lr: float) -> float:
        """Clip to optimizer.max_grad_norm, update, drop the gradients. Returns the global norm before clipping, and
        records that of each parameter group where it can (engine/grad_norm.py).

        If the norm is not finite, weights and optimizer state do not change; the gradients are dropped.
        """

    def gradient_checksums(self, compute_loss: Callable[[], Tensor]) -> dict[str, int]:
        """Checksums of the bits of the loss and of this rank's gradients, before they are summed over ranks, by name.
        Every rank calls it, before the first micro-step of a step; nothing of it remains. Raises UserError where the
        engine cannot do it."""

    def sync_compute_weights(self) -> None:
        """Copy `weights` (fp32) into the parameters that forward uses. Call it after writing `weights`."""

    def reshard(self) -> None:
        """Free gathered copies of parameters. Call it before reading the parameters of `model`."""

    def state(self) -> dict[str, dict[str, Any]]:
        """Tensors of a checkpoint: `model` by parameter name, and `optimizer` by names that all engines share.

        They are the engine's own memory: to resume, load into them, then call `sync_compute_weights`.
        """

    def close(self) -> None:
        """Free what would outlive the engine. Call it after the last step."""
