"""Matrices that are divided among ranks, each gathered on the one rank that works on it.

Two all-to-alls, whatever the number of matrices: one brings the parts of each matrix to its owner, one returns the
parts of the results. Under every engine a rank's part of a matrix is a run of its values in flattened order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

RunOfRank = tuple[int, int]
"""(start, length): the values [start, start + length) of a flattened matrix that a rank has."""


class MatrixLayout(NamedTuple):
    """How matrices are divided among ranks."""

    shapes: Sequence[tuple[int, int]]
    """Of each matrix."""
    owners: Sequence[int]
    """Rank that works on it."""
    parts: Sequence[Sequence[RunOfRank]]
    """By rank, its part of each matrix."""
    replica_size: int
    """Consecutive ranks that have all parts between them. The owner takes the parts of its own replica, and returns the
    result to all replicas."""

    def sources(self, matrix: int) -> range:
        """Ranks that send their parts of a matrix to its owner."""
        first = self.owners[matrix] // self.replica_size * self.replica_size
        return range(first, first + self.replica_size)


class MatrixExchange:
    """The exchange of a list of matrices in one layout. Every rank calls it at the same point."""

    def __init__(self, layout: MatrixLayout, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        """`device` and `dtype` are those of the exchange and of the work."""
        self._layout, self._rank, self._device, self._dtype = layout, rank, device, dtype
        ranks = range(len(layout.parts))
        self._owned = [m for m, owner in enumerate(layout.owners) if owner == rank]
        sends = [m for m in range(len(layout.owners)) if rank in layout.sources(m)]
        self._to_owners = [(owner, m) for owner in ranks for m in sends if layout.owners[m] == owner]
        self._from_sources = [(source, m) for source in ranks for m in self._owned if source in layout.sources(m)]
        self._to_all = [(target, m) for target in ranks for m in self._owned]
        self._from_owners = [
            (owner, m) for owner in ranks for m in range(len(layout.owners)) if layout.owners[m] == owner
        ]

    def apply(self, part: Callable[[int], Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`work` on every matrix. `part` gives this rank's values of a matrix by its number, 1-D; returns its values of
        each result."""
        received = self._exchange(
            [(owner, self._length(self._rank, m)) for owner, m in self._to_owners],
            (part(m) for _, m in self._to_owners),
            [(source, self._length(source, m)) for source, m in self._from_sources],
        )
        matrices = {m: torch.empty(self._layout.shapes[m], dtype=self._dtype, device=self._device) for m in self._owned}
        for (source, m), values in zip(self._from_sources, received, strict=True):
            self._part_of(matrices[m], source, m).copy_(values)
        del received  # one buffer less while the results are made
        results = {m: work(matrices.pop(m)) for m in self._owned}
        returned = self._exchange(
            [(target, self._length(target, m)) for target, m in self._to_all],
            (self._part_of(results[m], target, m) for target, m in self._to_all),
            [(owner, self._length(self._rank, m)) for owner, m in self._from_owners],
        )
        by_matrix = {m: values for (_, m), values in zip(self._from_owners, returned, strict=True)}
        return [by_matrix[m] for m in range(len(self._layout.owners))]

    def _length(self, rank: int, matrix: int) -> int:
        return self._layout.parts[rank][matrix][1]

    def _part_of(self, value: Tensor, rank: int, matrix: int) -> Tensor:
        start, length = self._layout.parts[rank][matrix]
        return value.reshape(-1)[start : start + length]

    def _exchange(
        self, sent: Sequence[tuple[int, int]], values: Iterable[Tensor], wanted: Sequence[tuple[int, int]]
    ) -> Sequence[Tensor]:
        """One all-to-all. `sent` and `wanted` are (rank, number of values) of each part, in the order of ranks."""
        out_sizes, in_sizes = [0] * len(self._layout.parts), [0] * len(self._layout.parts)
        for sizes, parts in ((out_sizes, sent), (in_sizes, wanted)):
            for rank, length in parts:
                sizes[rank] += length
        out = torch.empty(sum(out_sizes), dtype=self._dtype, device=self._device)
        for chunk, part in zip(out.split([length for _, length in sent]), values, strict=True):
            chunk.copy_(part)
        received = torch.empty(sum(in_sizes), dtype=self._dtype, device=self._device)
        dist.all_to_all_single(received, out, in_sizes, out_sizes)
        return received.split([length for _, length in wanted])
