"""Und-Enc: a SigLIP2-shaped vision encoder for images of any size, with pixel shuffle and vision experts (paper
§2.1).

Images of one pack are rows of one matrix, without padding: every projection sees all rows at once, and attention,
which has no weights, runs over runs of equally large images. Patches stand in block order (sequence/geometry.py), so
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
from emma_train.model.attention import scaled_dot_product, select_backend
from emma_train.model.varlen import find_kernel
from emma_train.sequence.spans import VarlenCall, full_call

Grids = Sequence[tuple[int, int]]
VERSATILE, STEM = 0, 1


class VisionOutput(NamedTuple):
    """A tuple, because FSDP before torch 2.13 looks for tensors in tuples only."""

    features: Tensor
    """[visual tokens, shuffle² * hidden], raster order within each image."""
    router_logits: Tensor | None
    """[images, 2] (versatile, STEM); None where there is no router."""


@dataclass
class Images:
    """Which rows of a matrix of patches are one image."""

    lengths: list[int]
    """Patches of each, one after another."""
    call: VarlenCall | None
    """The same for a kernel of variable length; None where torch's attention runs."""


class VisionEncoder(nn.Module):
    """SigLIP2 encoder; its last layers exist once more where the STEM expert does."""

    def __init__(self, config: VisionConfig, backend: str = "auto") -> None:
        """`backend` is the recipe's attention.backend; flex has nothing to offer here and takes sdpa."""
        super().__init__()
        self.config, self.backend = config, backend
        self.patch_embedding = nn.Conv2d(3, config.hidden, config.patch, config.patch)
        self.position_embedding = nn.Embedding(config.position_grid**2, config.hidden)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_used_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden, eps=config.eps)
        self.stem_layers = (
            nn.ModuleList(VisionLayer(config) for _ in range(config.expert_layers)) if config.stem_expert else None
        )
        self.router = Router(config) if config.router else None

    def forward(
        self,
        patches: Tensor,
        grids: Grids,
        experts: Sequence[int] | None = None,
        route_only: bool = False,
        num_routed: int | None = None,
    ) -> VisionOutput:
        """patches: [P, patch*patch*3] in [-1, 1], block order; grids: (rows, columns) of visual tokens per image.

        `experts` says which expert each image takes; None asks the router where there is one, and else takes the
        versatile one. The router chooses for the first `num_routed` images (None: all); the others take the versatile
        expert. `route_only` stops after the router and returns no features.
        """
        side = self.config.shuffle
        lengths = [rows * columns * side**2 for rows, columns in grids]
        x = self._embed(patches, grids)
        images = self._images(lengths, x)
        shared = len(self.layers) - self.config.expert_layers
        for layer in self.layers[:shared]:
            x = layer(x, images)
        router_logits = self.router(x, lengths) if self.router is not None else None
        if route_only:
            return VisionOutput(x.new_zeros(0, side**2 * self.config.hidden), router_logits)
        if self.stem_layers is None:
            for layer in self.layers[shared:]:
                x = layer(x, images)
        else:
            if experts is None:
                experts = self.choose_experts(router_logits, len(grids), num_routed)
            x = self._split_by_expert(x, lengths, experts)
        x = self.post_layernorm(x)
        return VisionOutput(x.reshape(-1, side**2 * self.config.hidden), router_logits)

    def choose_experts(self, router_logits: Tensor | None, num_images: int, num_routed: int | None = None) -> list[int]:
        """Expert of each image. Only the first `num_routed` (None: all) may take the STEM expert.

        The Gen adapter never sees features of the STEM expert in training, so references of edits are not routed.
        """
        experts = [VERSATILE] * num_images
        if router_logits is not None:
            stem = self.takes_stem(router_logits[:num_routed]).tolist()
            experts[: len(stem)] = [STEM if is_stem else VERSATILE for is_stem in stem]
        return experts

    def takes_stem(self, router_logits: Tensor) -> Tensor:
        """[images, 2] -> bool [images]: whether the probability of STEM exceeds the threshold."""
        return router_logits.float().softmax(-1)[:, STEM] > self.config.stem_threshold

    def _images(self, lengths: list[int], x: Tensor) -> Images:
        flash = lengths and select_backend(self.backend, x.device, x.dtype) == "flash"
        return Images(lengths, full_call(lengths, x.device) if flash else None)

    def _embed(self, patches: Tensor, grids: Grids) -> Tensor:
        weight = self.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)
        x = F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)
        table = self.position_embedding.weight
        sizes = {grid: self._positions(table, *grid) for grid in dict.fromkeys(grids)}
        # The sum over an empty slice keeps the table in the graph of a pack without images (contract 3).
        return x + torch.cat([*(sizes[grid] for grid in grids), table[:0]]).to(x.dtype)

    def _positions(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """The position table, resized to an image's patches, in block order: [patches, hidden]."""
        side, shuffle = self.config.position_grid, self.config.shuffle
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
            members = [i for i, e in enumerate(experts) if e == expert]
            index = torch.cat([*(rows[i] for i in members), rows[0][:0] if rows else torch.arange(0, device=x.device)])
            y = x[index]
            images = self._images([lengths[i] for i in members], y)
            for layer in layers:
                y = layer(y, images)
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
        self.fc1 = nn.Linear(config.hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden)

    def forward(self, x: Tensor, images: Images) -> Tensor:
        """x: [P, hidden]; each image sees its own patches only."""
        y = self.layer_norm1(x)
        y = image_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y), images, self.heads)
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
        """x: [P, hidden] -> [images, 2]."""
        pooled = [part.mean(0, keepdim=True) for part in x.split(list(lengths))] if lengths else []
        return self.fc2(F.gelu(self.fc1(self.norm(torch.cat([*pooled, x[:0]])))))


def image_attention(q: Tensor, k: Tensor, v: Tensor, images: Images, heads: int) -> Tensor:
    """Full attention within each image. q, k, v: [P, hidden] -> [P, hidden]."""
    if images.call is not None:
        q, k, v = (x.view(len(x), heads, x.shape[1] // heads) for x in (q, k, v))
        return find_kernel(q.device, q.shape[-1])(q, k, v, images.call).flatten(1)
    outputs, start = [], 0
    for length, run in groupby(images.lengths):
        count = len(list(run))
        stop = start + count * length
        parts = [x[start:stop].view(count, length, heads, -1).transpose(1, 2) for x in (q, k, v)]
        outputs.append(scaled_dot_product(*parts).transpose(1, 2).reshape(stop - start, -1))
        start = stop
    # Without images the projections stay in the graph, so that every rank reduces the same gradients (contract 3).
    return torch.cat(outputs) if outputs else q + k + v


@lru_cache(maxsize=1024)
def resize_matrix(size: int, side: int, device: torch.device) -> Tensor:
    """Bicubic resize of `side` values to `size`, as a matrix: float32 [size, side].

    The resize of a grid is one such product for its rows and one for its columns. What is kept between steps then knows
    nothing of the weights, and products are faster than the kernel, whose backward adds up in no fixed order on CUDA.
    """
    unit = torch.eye(side)[None, :, :, None]
    return F.interpolate(unit, (size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T.contiguous().to(device)
