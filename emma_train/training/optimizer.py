"""AdamW over the trainable parameters: weight decay on matrices only, and a learning rate for each parameter group."""

from collections.abc import Mapping

import torch
from torch import Tensor

from emma_train.config.schema import OptimizerConfig
from emma_train.stages.freeze import group_of


def make_optimizer(trainable: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over parameters by name; `lr_scale` of its groups multiplies the learning rate of the step.

    No group is empty. Engines pass plain tensors, never DTensors: with those torch 2.10 to 2.12 leaks memory at every
    step, and each parameter costs time to dispatch. One fused kernel updates all parameters of a group.
    """
    scales = {name: _lr_scale(name, config) for name in trainable}
    groups = []
    for scale in sorted(set(scales.values()), reverse=True):
        for is_matrix in (True, False):
            parameters = [p for n, p in trainable.items() if scales[n] == scale and (_num_dims(p) >= 2) == is_matrix]
            decay = config.weight_decay if is_matrix else 0.0
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _lr_scale(name: str, config: OptimizerConfig) -> float:
    return config.lr_scale.get(group_of(name), 1.0) if config.lr_scale else 1.0


def _num_dims(parameter: Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
