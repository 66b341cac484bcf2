"""The gradient norm of a model whose parameters lie on several device meshes, and that of each parameter group."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from emma_train.engine.torch_private import norms
from emma_train.metrics import is_recording, record_metric
from emma_train.model.parameter_groups import group_of

GRAD_SQUARE = "grad_square/"
"""Recorded under this prefix and a parameter group: this rank's share of the square of the group's gradient norm."""


def global_norm(gradients: Mapping[str, DTensor], sp_size: int = 1) -> float:
    """2-norm over all gradients, by parameter name, and ranks. Every rank calls it with its shards of the same
    gradients in the same order. `sp_size`: as in `record_squares`.

    Gradients are grouped by mesh and placement: torch.nn.utils.clip_grad_norm_ fails on a model on several meshes.
    """
    groups: dict[tuple, dict[str, Tensor]] = defaultdict(dict)
    for name, gradient in gradients.items():
        groups[gradient.device_mesh, gradient.placements][name] = gradient.to_local()
    total = 0.0
    for (mesh, placements), shards in groups.items():
        squares = torch.stack(norms(list(shards.values()))).double().square()
        num_copies = prod(mesh.size(i) for i, placement in enumerate(placements) if not placement.is_shard())
        record_squares(list(shards), squares / num_copies, sp_size)
        square = squares.sum()
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(square, group=mesh.get_group(dimension))
        total += float(square)
    return total**0.5


def record_squares(names: Sequence[str], squares: Tensor, sp_size: int) -> None:
    """Record the gradient norms by parameter group; never waits for the device.

    squares: [N], of this rank's parts of the gradients of the parameters `names`. `sp_size`: ranks that share a pack;
    a recorded sum is divided by it, but these ranks have different parts.
    """
    if not is_recording():
        return
    start = 0
    for group, members in groupby(names, key=group_of):
        end = start + sum(1 for _ in members)
        record_metric(f"{GRAD_SQUARE}{group}", squares[start:end].sum() * sp_size, "sum")
        start = end
