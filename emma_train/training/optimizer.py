"""AdamW over what trains; the implementation is chosen here and nowhere else."""

from collections.abc import Iterable

import torch
from torch import Tensor

from emma_train.config.schema import OptimizerConfig


def make_optimizer(trainable: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, and no group is empty.

    Engines hand over plain tensors, never DTensors: with those torch 2.10 to 2.12 leaks memory at every step, and each
    parameter costs time to dispatch. One fused kernel updates them all.
    """
    trainable = list(trainable)
    groups = [
        {"params": [p for p in trainable if _num_dims(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if _num_dims(p) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def _num_dims(parameter: Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
