"""What a checkpoint holds of a model in training, by name: the one view that saving and loading need of an engine.

An engine that shards in another way gives the same names: model.NAME, ema.NAME and optimizer.NAME.KEY, as tensors or as
DTensors that know which part of the whole this rank has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class State:
    """Live tensors: what is loaded into them is in the model. Hyperparameters are the recipe's and are not here."""

    weights: dict[str, Tensor]
    """model.NAME of what learns (and of buffers), ema.NAME of its averages."""
    optimizer: dict[str, Tensor]
    """optimizer.NAME.KEY: moments and step counters."""
    frozen: dict[str, Tensor]
    """model.NAME of what cannot have changed since the stage began."""

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What every checkpoint writes anew, by its folder (folder.PARTS)."""
        return {"weights": self.weights, "optimizer": self.optimizer}

    @property
    def all(self) -> dict[str, Tensor]:
        return {**self.weights, **self.optimizer, **self.frozen}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]) -> State:
    """The view of a model and an AdamW on its (sharded) parameters; moments that are not there yet are made."""
    _start(optimizer)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    if buffers:
        persistent = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in buffers.items() if name in persistent}
    learns = {name: p.detach() for name, p in parameters.items() if p.requires_grad} | buffers
    weights = {f"model.{name}": tensor for name, tensor in learns.items()}
    weights |= {f"ema.{name}": average for name, average in averages.items()}
    moments = {
        f"optimizer.{name}.{key}": value
        for name, p in parameters.items()
        if p.requires_grad
        for key, value in optimizer.state[p].items()
    }
    return State(
        weights, moments, {f"model.{name}": p.detach() for name, p in parameters.items() if not p.requires_grad}
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _start(optimizer: torch.optim.Optimizer) -> None:
    """AdamW makes its state in the first step that a parameter takes; a checkpoint may come before that."""
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                device = parameter.device if group["fused"] else "cpu"
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
