"""Sequence parallelism as in DeepSpeed Ulysses (arXiv:2309.14509): consecutive ranks share a pack.

Only the decoder is divided. A rank computes a run of the Und rows and a run of the Gen rows of a pack. Around
attention, ranks exchange rows for heads, so that every rank attends over the full pack with its share of the heads.
Vision encoder, adapters, embedding and output heads are computed by all ranks of a group alike, with the loss divided
by their number; gradients are summed over all ranks, as without sequence parallelism.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from emma_train.engine.world import World
from emma_train.model.attention import AttentionPlan, attention
from emma_train.model.cache import KVCache, LayerCache
from emma_train.model.decoder import Decoder, DecoderLayer


@dataclass(frozen=True)
class Rows:
    """The rows of a pack that each rank of a group computes: Und rows, then Gen rows."""

    of_rank: tuple[Tensor, ...]
    """int64 row numbers, by rank."""
    num_und: tuple[int, ...]
    """Number of Und rows, by rank."""

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.of_rank]


def divide(num_und: int, num_rows: int, parts: int, device: torch.device) -> Rows:
    """Cut the rows of both branches into `parts` runs, whose lengths differ by one at most."""
    branches = (_cuts(0, num_und, parts), _cuts(num_und, num_rows, parts))
    rows = [torch.cat([torch.arange(*run, device=device) for run in runs]) for runs in zip(*branches, strict=True)]
    return Rows(tuple(rows), tuple(stop - start for start, stop in branches[0]))


def divide_tokens(decoder: Decoder, world: World) -> None:
    """Divide the rows of every pack in `decoder` among the ranks that share it. Parameters keep their names."""
    mesh = init_device_mesh(
        world.device.type, (world.size // world.sp_size, world.sp_size), mesh_dim_names=("pack", "sequence")
    )
    group = mesh.get_group("sequence")
    shared = _SharedPack(group)
    decoder.forward = _divided(decoder.forward, shared)  # type: ignore[method-assign]
    for layer in decoder.layers:
        if isinstance(layer, DecoderLayer):
            layer.attend = shared.attend


class _SharedPack:
    """The exchanges between the ranks of a group in one forward pass."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._rows: Rows | None = None
        self._order: Tensor | None = None

    def begin(self, num_und: int, num_rows: int, device: torch.device) -> tuple[Tensor, int]:
        """Divide a pack. Returns the numbers of this rank's rows, and how many of them are Und rows."""
        self._rows = divide(num_und, num_rows, self.size, device)
        # Index of each row of the pack in the concatenation of all ranks' rows.
        self._order = torch.argsort(torch.cat(self._rows.of_rank))
        return self._rows.of_rank[self.rank], self._rows.num_und[self.rank]

    def join(self, x: Tensor) -> Tensor:
        """[local rows, C] of every rank -> [T, C] on every rank."""
        assert self._rows is not None and self._order is not None
        sizes = self._rows.sizes
        return _Exchange.apply(torch.cat([x] * self.size), [len(x)] * self.size, sizes, self.group)[self._order]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """Attention over the full pack with this rank's share of the heads: [local rows, heads, d] -> same shape."""
        heads = q.shape[1]
        # With more ranks than key heads, several ranks get the same key head.
        k, v = (x.repeat_interleave(max(1, self.size // x.shape[1]), dim=1) for x in (k, v))
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        return self._to_rows(attention(q, k, v, plan, cache), heads)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[local rows, heads, d] -> [T, heads / ranks, d]."""
        assert self._rows is not None and self._order is not None
        n, _, d = x.shape
        by_rank = x.view(n, self.size, -1, d).transpose(0, 1).reshape(self.size * n, -1, d)
        return _Exchange.apply(by_rank, [n] * self.size, self._rows.sizes, self.group)[self._order]

    def _to_rows(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads / ranks, d] -> [local rows, heads, d]."""
        assert self._rows is not None
        n, d = self._rows.sizes[self.rank], x.shape[-1]
        by_rank = x[torch.cat(self._rows.of_rank)]
        parts = _Exchange.apply(by_rank, self._rows.sizes, [n] * self.size, self.group)
        return parts.view(self.size, n, heads // self.size, d).transpose(0, 1).reshape(n, heads, d)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, with the number of rows for and from each rank. Backward sends gradients the opposite way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _divided(full_forward: Callable[..., Tensor], shared: _SharedPack) -> Callable[..., Tensor]:
    """The decoder's forward: takes and returns all rows of a pack, and computes this rank's."""

    def forward(x: Tensor, num_und: int, position: Tensor, plan: AttentionPlan, cache: KVCache | None = None) -> Tensor:
        rows, num_local_und = shared.begin(num_und, len(x), x.device)
        return shared.join(full_forward(x[rows], num_local_und, position[rows], plan, cache))

    return forward


def _cuts(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) cut into `parts` runs, whose lengths differ by one at most."""
    return list(pairwise(start + (stop - start) * part // parts for part in range(parts + 1)))
