"""The optimizer over the trainable parameters: AdamW, or Muon for hidden matrices and AdamW for the others.

Weight decay is on matrices only, and parameter groups may have a learning rate of their own.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import OptimizerConfig
from emma_train.engine.muon import optimizer_lines, takes_muon
from emma_train.engine.muon_adamw import MuonAdamW
from emma_train.model.parameter_groups import group_of

log = logging.getLogger(__name__)


def make_optimizer(trainable: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer over parameters by name; `lr_scale` of its groups multiplies the learning rate of the step.

    No group is empty. Engines pass plain tensors, never DTensors: with those torch 2.10 to 2.12 leaks memory at every
    step, and each parameter costs time to dispatch. One fused kernel updates all parameters of a group of AdamW.
    """
    adam: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "fused": True,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(_groups(trainable, config), **adam)
    matrices = {name: p for name, p in trainable.items() if takes_muon(name, _shape(p))}
    others = {name: p for name, p in trainable.items() if name not in matrices}
    groups = [{**group, "muon": False} for group in _groups(others, config)]
    groups += [{**group, "muon": True} for group in _groups(matrices, config)]
    return MuonAdamW(groups, list(matrices), config.muon, **adam)


def log_optimizer(config: OptimizerConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    """Log which of the trainable parameters, given by name and shape, take Muon."""
    for line in optimizer_lines(config, shapes):
        log.info("optimizer: %s", line)


def _groups(trainable: Mapping[str, Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    scales = {name: _lr_scale(name, config) for name in trainable}
    groups = []
    for scale in sorted(set(scales.values()), reverse=True):
        for is_matrix in (True, False):
            parameters = [p for n, p in trainable.items() if scales[n] == scale and (len(_shape(p)) >= 2) == is_matrix]
            decay = config.weight_decay if is_matrix else 0.0
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr_scale": scale})
    return groups


def _lr_scale(name: str, config: OptimizerConfig) -> float:
    return config.lr_scale.get(group_of(name), 1.0) if config.lr_scale else 1.0


def _shape(parameter: Tensor) -> Sequence[int]:
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place
    return shape
