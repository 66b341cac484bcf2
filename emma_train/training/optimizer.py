"""AdamW over the trainable parameters; the implementation is chosen here and nowhere else."""

import torch
from torch import nn

from emma_train.config.schema import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only. Frozen parameters are in no group, and no group is empty."""
    trainable = [p for p in model.parameters() if p.requires_grad]
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


def _num_dims(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
