"""Counter-based random numbers on the device (contract 1): value i of a seed is a hash of (seed, i).

There is no generator state, no loop over samples and no host sync. The integers are the same on every device; the
floats differ between devices in the last digit of the logarithm and the cosine.
"""

import math

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def hashed(seeds: Tensor, counters: Tensor) -> Tensor:
    """splitmix64 of seeds and counters (broadcast): int64."""
    x = _mix(seeds) + (counters + 1) * _GAMMA
    return _mix(x)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """float32 in (0, 1): the upper 23 bits plus one half, so that neither 0 nor 1 occurs (24 bits would round to 1)."""
    return ((_shift(hashed(seeds, counters), 41).double() + 0.5) / (1 << 23)).float()


def normal(seeds: Tensor, counters: Tensor) -> Tensor:
    """float32 N(0, 1) by Box-Muller on counters 2i and 2i + 1."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(seeds, 2 * counters)))
    return radius * torch.cos(2.0 * math.pi * uniform(seeds, 2 * counters + 1))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
