"""Und-Enc: a SigLIP2-shaped vision encoder for pictures of any size, with pixel shuffle and vision experts (paper
§2.1).

Pictures of one pack are rows of one matrix, without padding: every projection sees all rows at once, and attention,
which has no weights, runs over runs of equally large pictures. Patches stand in block order (sequence/geometry.py), so
pixel shuffle is a reshape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_train.config.schema import VisionConfig
from emma_train.model.attention import choose, scaled_dot_product
from emma_train.model.varlen import find_kernel
from emma_train.sequence.spans import Call, full_call

Grids = Sequence[tuple[int, int]]
VERSATILE, STEM = 0, 1


class VisionOutput(NamedTuple):
    """A tuple for the same reason as emma.Prediction."""

    features: Tensor
    """[visual tokens, shuffle² * hidden], raster order within each picture."""
    router_logits: Tensor | None
    """[pictures, 2] (versatile, STEM); None where there is no router."""


@dataclass
class Pictures:
    """Which rows of a matrix of patches are one picture."""

    lengths: list[int]
    """Patches of each, one after another."""
    call: Call | None
    """The same for a kernel of variable length; None where torch's attention runs."""


class VisionEncoder(nn.Module):
    """SigLIP2 encoder; its last layers exist once more where the STEM expert does."""

    def __init__(self, config: VisionConfig, backend: str = "auto") -> None:
        """`backend` is the recipe's attention.backend; flex has nothing to offer here and takes sdpa."""
        super().__init__()
        self.config, self.backend = config, backend
        self.patch_embedding = nn.Conv2d(3, config.hidden, config.patch, config.patch)
        self.position_embedding = nn.Embedding(config.table**2, config.hidden)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.post_layernorm = nn.LayerNorm(config.hidden, eps=config.eps)
        self.stem_layers = (
            nn.ModuleList(VisionLayer(config) for _ in range(config.expert_layers)) if config.stem_expert else None
        )
        self.router = Router(config) if config.router else None

    def forward(
        self, patches: Tensor, grids: Grids, experts: Sequence[int] | None = None, route_only: bool = False
    ) -> VisionOutput:
        """patches: [P, patch*patch*3] in [-1, 1], block order; grids: (rows, columns) of visual tokens per picture.

        `experts` says which expert each picture takes; None asks the router where there is one, and else takes the
        versatile one. `route_only` stops after the router and returns no features.
        """
        side = self.config.shuffle
        lengths = [rows * columns * side**2 for rows, columns in grids]
        x = self._embed(patches, grids)
        pictures = self._pictures(lengths, x)
        shared = len(self.layers) - self.config.expert_layers
        for layer in self.layers[:shared]:
            x = layer(x, pictures)
        router_logits = self.router(x, lengths) if self.router is not None else None
        if route_only:
            return VisionOutput(x.new_zeros(0, side**2 * self.config.hidden), router_logits)
        if self.stem_layers is None:
            for layer in self.layers[shared:]:
                x = layer(x, pictures)
        else:
            if experts is None:
                experts = self.choose(router_logits, len(grids))
            x = self._split_by_expert(x, lengths, experts)
        x = self.post_layernorm(x)
        return VisionOutput(x.reshape(-1, side**2 * self.config.hidden), router_logits)

    def choose(self, router_logits: Tensor | None, num_pictures: int) -> list[int]:
        """Expert of each picture."""
        if router_logits is None:
            return [VERSATILE] * num_pictures
        return [STEM if stem else VERSATILE for stem in self.takes_stem(router_logits).tolist()]

    def takes_stem(self, router_logits: Tensor) -> Tensor:
        """[pictures, 2] -> bool [pictures]: whether the probability of STEM exceeds the threshold."""
        return router_logits.float().softmax(-1)[:, STEM] > self.config.stem_threshold

    def _pictures(self, lengths: list[int], x: Tensor) -> Pictures:
        flash = lengths and choose(self.backend, x.device, x.dtype) == "flash"
        return Pictures(lengths, full_call(lengths).to(x.device) if flash else None)

    def _embed(self, patches: Tensor, grids: Grids) -> Tensor:
        weight = self.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)
        table = self.position_embedding.weight
        sizes = {grid: self._positions(table, *grid) for grid in dict.fromkeys(grids)}
        # The sum over an empty slice keeps the table in the graph of a pack without pictures (contract 3).
        return x + torch.cat([*(sizes[grid] for grid in grids), table[:0]]).to(x.dtype)

    def _positions(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """The position table, resized to a picture's patches, in block order: [patches, hidden]."""
        side, shuffle = self.config.table, self.config.shuffle
        height, width = rows * shuffle, columns * shuffle
        grid = table.view(side, side, -1)
        if (height, width) != (side, side):
            tall, wide = (resize_matrix(size, side, table.device) for size in (height, width))
            grid = wide @ (tall @ grid.float().flatten(1)).view(height, side, -1)
        blocks = grid.view(rows, shuffle, columns, shuffle, -1)
        return blocks.transpose(1, 2).reshape(height * width, -1)

    def _split_by_expert(self, x: Tensor, lengths: Sequence[int], experts: Sequence[int]) -> Tensor:
        assert self.stem_layers is not None
        shared = len(self.layers) - self.config.expert_layers
        rows = list(torch.arange(len(x), device=x.device).split(list(lengths)))
        outputs, order = [], []
        for expert, layers in ((VERSATILE, self.layers[shared:]), (STEM, self.stem_layers)):
            mine = [i for i, e in enumerate(experts) if e == expert]
            index = torch.cat([*(rows[i] for i in mine), rows[0][:0] if rows else torch.arange(0, device=x.device)])
            y = x[index]
            pictures = self._pictures([lengths[i] for i in mine], y)
            for layer in layers:
                y = layer(y, pictures)
            outputs.append(y)
            order.append(index)
        back = torch.empty(len(x), dtype=torch.int64, device=x.device)
        back[torch.cat(order)] = torch.arange(len(x), device=x.device)
        return torch.cat(outputs)[back]


class VisionLayer(nn.Module):
    """Pre-norm transformer layer of SigLIP2; names follow the public checkpoint."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.layer_norm1 = nn.LayerNorm(config.hidden, eps=config.eps)
        self.q_proj = nn.Linear(config.hidden, config.hidden)
        self.k_proj = nn.Linear(config.hidden, config.hidden)
        self.v_proj = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)
        self.layer_norm2 = nn.LayerNorm(config.hidden, eps=config.eps)
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor, pictures: Pictures) -> Tensor:
        """x: [P, hidden]; each picture sees its own patches only."""
        y = self.layer_norm1(x)
        y = picture_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y), pictures, self.heads)
        x = x + self.out_proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Router(nn.Module):
    """MLP on the mean-pooled output of the last shared layer (paper §2.1)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden, eps=config.eps)
        self.fc1 = nn.Linear(config.hidden, config.router_hidden)
        self.fc2 = nn.Linear(config.router_hidden, 2)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """x: [P, hidden] -> [pictures, 2]."""
        pooled = [part.mean(0, keepdim=True) for part in x.split(list(lengths))] if lengths else []
        return self.fc2(F.gelu(self.fc1(self.norm(torch.cat([*pooled, x[:0]])))))


def picture_attention(q: Tensor, k: Tensor, v: Tensor, pictures: Pictures, heads: int) -> Tensor:
    """Full attention within each picture. q, k, v: [P, hidden] -> [P, hidden]."""
    if pictures.call is not None:
        q, k, v = (x.view(len(x), heads, -1) for x in (q, k, v))
        return find_kernel(q.device.type)(q, k, v, pictures.call).flatten(1)
    outputs, start = [], 0
    for length, run in groupby(pictures.lengths):
        count = len(list(run))
        stop = start + count * length
        parts = [x[start:stop].view(count, length, heads, -1).transpose(1, 2) for x in (q, k, v)]
        outputs.append(scaled_dot_product(*parts).transpose(1, 2).reshape(stop - start, -1))
        start = stop
    # Without pictures the projections stay in the graph, so that every rank reduces the same gradients (contract 3).
    return torch.cat(outputs) if outputs else q + k + v


@lru_cache(maxsize=1024)
def resize_matrix(size: int, side: int, device: torch.device) -> Tensor:
    """Bicubic resize of `side` values to `size`, as a matrix: float32 [size, side].

    The resize of a grid is one such product for its rows and one for its columns. What is kept between steps then knows
    nothing of the weights, and products are faster than the kernel, whose backward adds up in no fixed order on CUDA.
    """
    unit = torch.eye(side)[None, :, :, None]
    return F.interpolate(unit, (size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.contiguous().to(device)
