"""Averaged weights: fp32 shards shaped like the trainable parameters, updated without communication."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from emma_train.engine.flat_shard import local


class Ema:
    """ema <- decay * ema + (1 - decay) * weight, after every optimizer step. Frozen parameters have no average."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: str = "auto") -> None:
        """`weights`: this rank's part of what trains, by name; `device`: cpu keeps the averages in host memory."""
        self.decay = decay
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        copied = {name: weight.clone() for name, weight in self._weights.items()}
        self.averages = {name: w.cpu() for name, w in copied.items()} if device == "cpu" else copied

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        averages = [local(a) for a in self.averages.values()]
        weights = [local(w) for w in self._weights.values()]
        if averages and averages[0].device != weights[0].device:
            weights = [w.to(averages[0].device) for w in weights]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are now."""
        for name, weight in self._weights.items():
            local(self.averages[name]).copy_(local(weight))

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
            mine, average = local(weight), local(self.averages[name])
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)
