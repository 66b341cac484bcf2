"""Averaged weights: fp32 shards shaped like the trainable parameters, updated without communication."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from emma_train.engine.flat_shard import local
from emma_train.engine.torch_private import lerp_in_place


class Ema:
    """ema <- decay * ema + (1 - decay) * weight, after every optimizer step. Frozen parameters have no average."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: str = "auto") -> None:
        """`weights`: this rank's shards of the trainable parameters, by name. `device`: cpu keeps the averages in host
        memory, auto beside the weights."""
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
        lerp_in_place(averages, weights, 1.0 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside this block the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight_values, average = local(weight), local(self.averages[name])
            before = weight_values.clone()
            weight_values.copy_(average)
            average.copy_(before)
