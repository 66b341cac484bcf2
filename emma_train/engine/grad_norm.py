"""The global gradient norm of a model whose parameters lie on several device meshes."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from emma_train.engine.torch_private import norms


def global_norm(gradients: Sequence[DTensor]) -> float:
    """2-norm over all gradients and ranks. Every rank calls it with its shards of the same gradients in the same order.

    Gradients are grouped by mesh and placement: torch.nn.utils.clip_grad_norm_ fails on a model on several meshes.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[gradient.device_mesh, gradient.placements].append(gradient.to_local())
    total = 0.0
    for (mesh, placements), shards in groups.items():
        square = torch.stack(norms(shards)).double().square().sum()
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(square, group=mesh.get_group(dimension))
        total += float(square)
    return total**0.5
