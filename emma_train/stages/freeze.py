"""Which parameters are trainable in a stage, as pure functions of their names.

`freeze` is called once while the model is built (training/build.py), before sharding. `fingerprints` and
`changed_parameters` prove afterwards, for the run summary and the tests, that no frozen parameter has changed.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from emma_train.model.parameter_groups import group_of


def is_trainable(name: str, trainable: Iterable[str]) -> bool:
    """Whether a parameter learns where the groups `trainable` do."""
    return group_of(name) in trainable


def freeze(model: nn.Module, trainable: Iterable[str]) -> dict[str, int]:
    """Set requires_grad by group and return the number of trainable parameters per group."""
    counts = dict.fromkeys(trainable, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(name, counts))
        if parameter.requires_grad:
            counts[group_of(name)] += parameter.numel()
    return counts


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Hash of this rank's bytes of every frozen parameter."""
    return {name: _hash(p) for name, p in model.named_parameters() if not p.requires_grad}


def changed_parameters(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """Names of frozen parameters whose bytes on this rank differ from `before`."""
    return [name for name, digest in fingerprints(model).items() if before.get(name) != digest]


def _hash(parameter: Tensor) -> str:
    parameter = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 keeps the rank's part here
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    content = local.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
