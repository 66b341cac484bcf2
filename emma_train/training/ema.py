"""Averaged weights: fp32 shards shaped like the trainable parameters, updated without communication."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """ema <- decay * ema + (1 - decay) * weight, after every optimizer step. Frozen parameters have no average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        averages = [_local(a) for a in self.averages.values()]
        torch._foreach_lerp_(averages, [_local(w) for w in self._weights.values()], 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are now."""
        for name, weight in self._weights.items():
            self.averages[name].copy_(weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within, the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            average = self.averages[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
