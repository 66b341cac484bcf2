"""The global gradient norm, whatever meshes the gradients are spread over."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def global_norm(gradients: Sequence[DTensor]) -> float:
    """2-norm over all ranks; every rank calls it, with its part of the same gradients in the same order.

    Gradients are grouped by how they are spread: torch's own norm refuses a model on several meshes.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[gradient.device_mesh, gradient.placements].append(gradient.to_local())
    total = 0.0
    for (mesh, placements), shards in groups.items():
        square = torch.stack(torch._foreach_norm(shards)).double().square().sum()
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(square, group=mesh.get_group(dimension))
        total += float(square)
    return total**0.5
