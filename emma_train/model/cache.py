"""Keys and values of the tokens before: a pack may be continued without computing it again (generation only).

Each layer keeps one table, by sample and position. Tokens that are new are written to it and attend over it; a token at
a position that is taken replaces it, as a target does at every step of its flow.
"""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples, self.capacity = num_samples, capacity
        self._tables: list[Tensor] = []

    def add(self, k: Tensor, v: Tensor, rows: Tensor) -> list[Tensor]:
        """k, v: [T, kv_heads, d] to place [T] of [samples * capacity] -> all so far, [samples, kv_heads, capacity, d].

        What was never written is zero and beyond every limit.
        """
        if not self._tables:
            self._tables = [x.new_zeros(self.num_samples * self.capacity, *x.shape[1:]) for x in (k, v)]
        for table, x in zip(self._tables, (k, v), strict=True):
            table[rows] = x
        return [t.view(self.num_samples, self.capacity, *t.shape[1:]).transpose(1, 2) for t in self._tables]


class KVCache:
    """What a model remembers of a pack of `num_samples` samples that grow to `capacity` tokens at most."""

    def __init__(self, num_samples: int, capacity: int) -> None:
        self.num_samples, self.capacity = num_samples, capacity
        self._layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        """The cache of a layer of the decoder."""
        return self._layers.setdefault(index, LayerCache(self.num_samples, self.capacity))
