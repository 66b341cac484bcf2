"""From visual features to LLM tokens: channel-wise fusion, the Und and Gen adapters, 2D positions, flow time (paper
§2.1)."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """LayerNorm on the semantic channels, concatenated with the scaled latent, through a 2-layer MLP to the LLM
    width."""

    def __init__(self, semantic: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(semantic, eps=1e-6)
        self.fc1 = nn.Linear(semantic + latent, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, semantic: Tensor, latent: Tensor) -> Tensor:
        """semantic: [n, shuffle²*hidden], or [0, ...] for zeros; latent: [n, C] scaled -> [n, LLM hidden]."""
        return self.project(filled_up(self.norm(semantic), len(latent)), latent)

    def project(self, semantic: Tensor, latent: Tensor) -> Tensor:
        """The MLP on semantic channels that are already normalised."""
        return self.fc2(F.gelu(self.fc1(torch.cat([semantic, latent.to(semantic.dtype)], dim=-1))))


class GenAdapter(Adapter):
    """The adapter of reference and target images; it adds an embedding of their flow time."""

    def __init__(
        self,
        semantic: int,
        latent: int,
        hidden: int,
        time_features: int,
        has_mlp: bool = True,
        has_placeholder: bool = True,
    ) -> None:
        """Without `has_mlp` it has no norm and matrices, and uses another adapter's; without `has_placeholder` zeros
        stand for the semantic channels of a target."""
        if has_mlp:
            super().__init__(semantic, latent, hidden)
        else:
            nn.Module.__init__(self)
        self.placeholder = nn.Parameter(torch.zeros(semantic)) if has_placeholder else None
        self.time_fc1 = nn.Linear(time_features, hidden)
        self.time_fc2 = nn.Linear(hidden, hidden)

    def forward_images(self, semantic: Tensor, latent: Tensor, time: Tensor, adapter: Adapter | None = None) -> Tensor:
        """semantic: [r, S] of the r reference tokens, or [0, S] for zeros; latent: [r + n, C], references first, then
        noised targets; time: [n] flow time of the targets -> [r + n, LLM hidden]. References take time 0. `adapter`:
        whose norm and matrices to use; None: those of this adapter.
        """
        adapter = self if adapter is None else adapter
        if self.placeholder is None:
            stand_in = semantic.new_zeros(len(time), semantic.shape[1])
        else:
            stand_in = self.placeholder.to(semantic.dtype).expand(len(time), -1)
        num_reference = len(latent) - len(time)
        x = adapter.project(torch.cat([filled_up(adapter.norm(semantic), num_reference), stand_in]), latent)
        time = torch.cat([time.new_zeros(num_reference), time])
        features = time_features(time, self.time_fc1.in_features).to(x.dtype)
        return x + self.time_fc2(F.silu(self.time_fc1(features)))


def filled_up(x: Tensor, num: int) -> Tensor:
    """The rows of x, and rows of zeros up to `num`: [num, C]."""
    return x if len(x) == num else torch.cat([x, x.new_zeros(num - len(x), x.shape[1])])


def time_features(time: Tensor, num: int) -> Tensor:
    """Sinusoidal features of flow time in [0, 1]: [n] -> float32 [n, num]."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(num // 2, device=time.device) / (num // 2))
    angles = 1000.0 * time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_2d(grids: Sequence[tuple[int, int]], hidden: int, device: torch.device) -> Tensor:
    """Fixed 2D sin-cos position of every visual token of the images: float32 [tokens, hidden]. Made on the device."""
    if not grids:
        return torch.zeros(0, hidden, device=device)
    size = 1 << (max(map(max, grids)) - 1).bit_length()  # few tables, though images have many sizes
    table = _sincos(size, hidden // 4, device)
    by_grid = {grid: _grid_positions(table, *grid) for grid in dict.fromkeys(grids)}
    positions = torch.cat([by_grid[grid] for grid in grids])
    return F.pad(positions, (0, hidden - positions.shape[-1]))


def _grid_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, 4 * quarter]: row, then column, of each token."""
    of_row, of_column = table[:rows, None].expand(-1, columns, -1), table[None, :columns].expand(rows, -1, -1)
    return torch.cat([of_row, of_column], dim=-1).flatten(0, 1)


@lru_cache(maxsize=16)
def _sincos(size: int, quarter: int, device: torch.device) -> Tensor:
    """Sines and cosines of the coordinates below `size`: float32 [size, 2 * quarter]; copied to the device once."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(size)[:, None].double() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float().to(device)
