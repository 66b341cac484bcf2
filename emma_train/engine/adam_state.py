"""AdamW's state of a parameter, the same for every engine. Checkpoints hold no hyperparameters: the recipe has them."""

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """`step` and both moments of a parameter. Before the first step they are created as zeros, so that a checkpoint can
    be loaded into them."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        device = parameter.device if on_device else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state |= {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
    return state


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step: `lr` times the `lr_scale` of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
