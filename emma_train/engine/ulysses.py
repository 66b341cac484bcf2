"""Sequence parallelism as in Ulysses: some ranks in a row compute the same packs, each its part of their tokens.

The decoder alone is divided. A rank computes a run of the Und rows and a run of the Gen rows of a pack, and attention
trades heads for tokens, so that every rank attends over the whole pack with its share of the heads. Images, adapters,
embedding and heads are computed by all ranks of a group alike, each for its share of the loss; gradients are summed
over all ranks as ever.
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
from emma_train.model.cache import Cache, LayerCache
from emma_train.model.decoder import Decoder, DecoderLayer


@dataclass(frozen=True)
class Rows:
    """Which rows of a pack each rank of a group has: its Und rows, then its Gen rows."""

    of_rank: tuple[Tensor, ...]
    """int64 row numbers."""
    num_und: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.of_rank]


def divide(num_und: int, num_rows: int, parts: int, device: torch.device) -> Rows:
    """Runs of both branches, as even as whole rows allow."""
    branches = (_cuts(0, num_und, parts), _cuts(num_und, num_rows, parts))
    rows = [torch.cat([torch.arange(*run, device=device) for run in runs]) for runs in zip(*branches, strict=True)]
    return Rows(tuple(rows), tuple(stop - start for start, stop in branches[0]))


def divide_tokens(decoder: Decoder, world: World) -> None:
    """Have the ranks of a group share the tokens of their packs in `decoder`; parameters keep their names."""
    mesh = init_device_mesh(
        world.device.type, (world.size // world.sp_size, world.sp_size), mesh_dim_names=("pack", "sequence")
    )
    group = mesh.get_group("sequence")
    shared = _Shared(group)
    decoder.forward = _divided(decoder.forward, shared)  # type: ignore[method-assign]
    for layer in decoder.layers:
        if isinstance(layer, DecoderLayer):
            layer.attend = shared.attend


class _Shared:
    """What the ranks of a group do together in one forward pass."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._rows: Rows | None = None
        self._order: Tensor | None = None

    def begin(self, num_und: int, num_rows: int, device: torch.device) -> tuple[Tensor, int]:
        """Divide a pack: this rank's rows, and how many of them are the Und branch's."""
        self._rows = divide(num_und, num_rows, self.size, device)
        # Where each row of the pack is among all ranks' rows, one rank's after the other's.
        self._order = torch.argsort(torch.cat(self._rows.of_rank))
        return self._rows.of_rank[self.rank], self._rows.num_und[self.rank]

    def join(self, x: Tensor) -> Tensor:
        """[own rows, C] of every rank -> [T, C] on every rank."""
        assert self._rows is not None and self._order is not None
        sizes = self._rows.sizes
        return _Exchange.apply(torch.cat([x] * self.size), [len(x)] * self.size, sizes, self.group)[self._order]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """`attention` over whole packs, by heads; q, k, v and the result are of this rank's rows."""
        heads = q.shape[1]
        # Where ranks outnumber the key heads, several get the same one.
        k, v = (x.repeat_interleave(max(1, self.size // x.shape[1]), dim=1) for x in (k, v))
        q, k, v = (self._to_heads(x) for x in (q, k, v))
        return self._to_rows(attention(q, k, v, plan, cache), heads)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[own rows, heads, d] -> [T, heads / ranks, d]."""
        assert self._rows is not None and self._order is not None
        n, _, d = x.shape
        by_rank = x.view(n, self.size, -1, d).transpose(0, 1).reshape(self.size * n, -1, d)
        return _Exchange.apply(by_rank, [n] * self.size, self._rows.sizes, self.group)[self._order]

    def _to_rows(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads / ranks, d] -> [own rows, heads, d]."""
        assert self._rows is not None
        n, d = self._rows.sizes[self.rank], x.shape[-1]
        by_rank = x[torch.cat(self._rows.of_rank)]
        parts = _Exchange.apply(by_rank, self._rows.sizes, [n] * self.size, self.group)
        return parts.view(self.size, n, heads // self.size, d).transpose(0, 1).reshape(n, heads, d)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: so many to each rank, so many from each rank; backward sends gradients the way back."""

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


def _divided(whole: Callable[..., Tensor], shared: _Shared) -> Callable[..., Tensor]:
    """The decoder's forward on this rank's rows of a pack, with all rows coming out."""

    def forward(x: Tensor, num_und: int, position: Tensor, plan: AttentionPlan, cache: Cache | None = None) -> Tensor:
        rows, own_und = shared.begin(num_und, len(x), x.device)
        return shared.join(whole(x[rows], own_und, position[rows], plan, cache))

    return forward


def _cuts(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """[start, stop) in so many runs, whose lengths differ by one at most."""
    return list(pairwise(start + (stop - start) * part // parts for part in range(parts + 1)))
