"""FSDP2 on gloo/CPU and NCCL/CUDA: fp32 master weights and reduction, bf16 or fp32 compute."""

import warnings
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from emma_train.config.schema import EngineConfig
from emma_train.engine.adam import adam_state
from emma_train.engine.protocol import MakeOptimizer
from emma_train.engine.world import World
from emma_train.model.emma import Emma


class FsdpEngine:
    """An FSDP2-sharded model and the optimizer on its shards (engine/protocol.py)."""

    def __init__(
        self, model: Emma, config: EngineConfig, clip: float, world: World, make_optimizer: MakeOptimizer
    ) -> None:
        """`model` is on the meta device."""
        shard(model, config, world)
        model.to_empty(device=world.device)
        self.model: nn.Module = model
        # Held from here on: where a unit is gathered, the model's own names stand for gathered copies.
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self._optimizer = make_optimizer(model)
        self._clip = clip
        self._every_micro_step = config.reduce_every_micro_step
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        # Units that do not train have no gradient to hold back; torch fails on those that did not even run.
        self._trained = [m for m in self._units if any(p.requires_grad for p in m.parameters())]

    def accumulate(self, loss: Tensor, last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        for module in self._trained:
            module.set_requires_gradient_sync(last or self._every_micro_step, recurse=False)
        self.model.set_is_last_backward(last)
        loss.backward()

    def step(self, lr: float) -> float:
        parameters = [p for p in self.weights.values() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        norm = float(total)
        if isfinite(norm):
            if self._clip > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, total)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def refresh(self) -> None:
        self.reshard()  # the next forward gathers anew

    def reshard(self) -> None:
        for module in self._units:
            module.reshard()

    def state(self) -> dict[str, dict[str, Any]]:
        optimizer = {
            f"state.{name}.{key}": value
            for name, weight in self.weights.items()
            if weight.requires_grad
            for key, value in adam_state(self._optimizer, weight).items()
        }
        return {"model": {name: w.detach() for name, w in self.weights.items()}, "optimizer": optimizer}


def shard(model: Emma, config: EngineConfig, world: World) -> None:
    """Shard in place: the vision encoder and every decoder layer are units, the rest belongs to the root.

    Every rank runs every unit in every micro-step (contract 3). Gradients are summed, not averaged: the loss account
    has divided by the counts of the whole step already.
    """
    # Of torch's own making: its deprecated collectives, and views that we never write to in place.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units: list[nn.Module] = [model.vision, *model.decoder.layers]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    register_fsdp_forward_method(model, "route")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no pre-multiplied sum, and both setters reach one module only.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
