"""What the loop asks of an engine; the only seam between training and sharding."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """A sharded model with its optimizer."""

    model: nn.Module
    """Call it for a forward pass; parameters may be shards."""
    optimizer: torch.optim.Optimizer

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; gradients are summed over ranks by the last one of the step."""

    def clip(self, max_norm: float) -> float:
        """Global gradient norm before clipping; clips to max_norm where it is above 0."""

    def update(self, lr: float) -> None:
        """One optimizer step, then forget the gradients."""

    def reshard(self) -> None:
        """Before weights are read or exchanged: give up gathered copies of them."""

    def discard(self) -> None:
        """Forget the gradients: a skipped step moves nothing."""
