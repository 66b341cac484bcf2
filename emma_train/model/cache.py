"""Keys and values of earlier tokens, so that a pack can be continued without computing it again (generation only).

Each layer keeps one table, indexed by sample and position. New tokens are written to it and attend to all of it. A
token at a position that is already filled replaces the old one; a target image does so at every flow step.
"""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples, self.capacity = num_samples, capacity
        self._tables: list[Tensor] = []

    def add(self, k: Tensor, v: Tensor, rows: Tensor) -> list[Tensor]:
        """Write k, v: [T, kv_heads, d] to `rows` [T] of [samples * capacity]; return the tables so far, each
        [samples, kv_heads, capacity, d].

        Rows that were never written are zero, and the mask excludes them.
        """
        if not self._tables:
            self._tables = [x.new_zeros(self.num_samples * self.capacity, *x.shape[1:]) for x in (k, v)]
        for table, x in zip(self._tables, (k, v), strict=True):
            table[rows] = x
        return [t.view(self.num_samples, self.capacity, *t.shape[1:]).transpose(1, 2) for t in self._tables]


class KVCache:
    """Keys and values of all layers for `num_samples` samples of at most `capacity` tokens each."""

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples, self.capacity = num_samples, capacity
        self._layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        """The cache of a layer of the decoder."""
        return self._layers.setdefault(index, LayerCache(self.num_samples, self.capacity))
