"""FSDP2 and HSDP on gloo/CPU and NCCL/CUDA: fp32 master weights and reduction, bf16 or fp32 compute."""

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from emma_train.config.schema import EngineConfig
from emma_train.engine.adam_state import set_learning_rate
from emma_train.engine.flat_shard import Run, local
from emma_train.engine.grad_norm import global_norm
from emma_train.engine.muon_adamw import MuonAdamW, optimizer_state
from emma_train.engine.protocol import MakeOptimizer
from emma_train.engine.torch_private import keep_sizes_constant, local_size_and_offset, scale_in_place
from emma_train.engine.units import parameters_of, vision_units
from emma_train.engine.world import World
from emma_train.errors import UserError
from emma_train.model.decoder import DecoderLayer
from emma_train.model.emma import Emma


class FsdpEngine:
    """An FSDP2-sharded model and the optimizer on its shards (engine/protocol.py)."""

    def __init__(
        self, model: Emma, config: EngineConfig, max_grad_norm: float, world: World, make_optimizer: MakeOptimizer
    ) -> None:
        """`model` is on the meta device. Raises UserError where the number of ranks does not fit engine.replicate."""
        trains = shard(model, config, world)
        self.units = list(trains)
        """The first module of each FSDP unit."""
        model.to_empty(device="cpu" if config.offload_optimizer else world.device)
        self.model: nn.Module = model
        # Kept from here on: while a unit is gathered, the model's parameters are the gathered copies.
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        meshes = {cast(DTensor, weight).device_mesh for weight in self.weights.values()}
        self.groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        self._shards = {name: local(weight) for name, weight in self.weights.items() if weight.requires_grad}
        self._optimizer = make_optimizer(self._shards)
        if isinstance(self._optimizer, MuonAdamW):
            runs = {name: _run_of(cast(DTensor, self.weights[name]), shard_) for name, shard_ in self._shards.items()}
            shapes = {name: weight.shape for name, weight in self.weights.items()}
            self._optimizer.connect(runs, shapes, world, world.size // config.replicate)
        self._max_grad_norm = max_grad_norm
        self._sp_size = world.sp_size
        self._every_micro_step = config.reduce_every_micro_step
        self._reshard = config.reshard_after_forward
        # Frozen units have no gradient to reduce, and torch fails on units that did not run.
        self._trained = [unit for unit in self.units if trains[unit]]

    def accumulate(self, loss: Tensor, last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        for module in self._trained:
            module.set_requires_gradient_sync(last or self._every_micro_step, recurse=False)
            # Replicas exchange nothing before the last micro-step; until then each adds up its own shards.
            module.set_requires_all_reduce(last, recurse=False)
        for module in self.units:
            # Weights that stay gathered after the forward pass stay so until the optimizer changes them.
            module.set_reshard_after_backward(last or self._reshard, recurse=False)
        self.model.set_is_last_backward(last)
        (loss / self._sp_size).backward()  # every rank that shares a pack has the loss of the full pack

    def gradient_checksums(self, compute_loss: Callable[[], Tensor]) -> dict[str, int]:
        sums: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            sums[name] = sums.get(name, 0) + _checksum(gradient)

        hooks = []
        for unit in self._trained:
            # The gathered parameters, whose gradients are those of this rank alone; FSDP keeps these tensors.
            unit.unshard()
            hooks += [
                parameter.register_hook(partial(note, name))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and not isinstance(parameter, DTensor)
            ]
            unit.reshard()
        loss = compute_loss()
        sums["loss"] = _checksum(loss.detach())
        self.accumulate(loss, last=True)
        for hook in hooks:
            hook.remove()
        for name in self._shards:
            self.weights[name].grad = None
        return {name: int(value) for name, value in sums.items()}

    @torch.no_grad()  # in which to_local() is the shard itself: what comes between norm and AdamW keeps a card waiting
    def step(self, lr: float) -> float:
        gradients = {name: cast(DTensor, g) for name in self._shards if (g := self.weights[name].grad) is not None}
        norm = global_norm(gradients, self._sp_size)
        if isfinite(norm):
            for name, gradient in gradients.items():
                self._shards[name].grad = gradient.to_local()
            if 0 < self._max_grad_norm < norm:
                scale_in_place([g.to_local() for g in gradients.values()], self._max_grad_norm / (norm + 1e-6))
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for name in gradients:
            self.weights[name].grad = None
        return norm

    def sync_compute_weights(self) -> None:
        self.reshard()  # the next forward pass gathers the new weights

    def reshard(self) -> None:
        for unit in self.units:
            unit.reshard()

    def state(self) -> dict[str, dict[str, Any]]:
        optimizer: dict[str, Any] = {}
        for name, shard_ in self._shards.items():
            weight = cast(DTensor, self.weights[name])
            for key, value in optimizer_state(self._optimizer, name, shard_).items():
                optimizer[f"{name}.{key}"] = value if key == "step" else _with_placement_of(weight, value)
        return {"model": {name: weight.detach() for name, weight in self.weights.items()}, "optimizer": optimizer}

    def close(self) -> None:
        pass  # nothing outlives the engine: the garbage collector frees it all


def _checksum(values: Tensor) -> Tensor:
    """Sum of the bits of values as integers: int64, 0-dim. One that flips changes it."""
    return values.contiguous().view(torch.int32 if values.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


def shard(model: Emma, config: EngineConfig, world: World) -> dict[FSDPModule, bool]:
    """Shard in place. FSDP units are runs of layers of the vision encoder and the rest of it (engine/units.py), and
    every decoder layer; what is left belongs to the root. Returns the first module of each, and whether it trains.

    Every rank runs every unit in every micro-step (contract 3). In a stage that skips the Gen branch, the Gen part of a
    layer is a unit of its own, which is never gathered. Gradients are summed, not averaged: the loss is divided by the
    token counts of the full step already.
    """
    mesh, unsharded_mesh = make_meshes(config, world)
    on_gpu = world.device.type == "cuda"
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    policy: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if config.offload_optimizer else OffloadPolicy(),
        "reshard_after_forward": config.reshard_after_forward,
    }
    layers: list[nn.Module] = list(model.decoder.layers)
    skipped = [x.gen for x in layers if isinstance(x, DecoderLayer) and x.skip_gen_branch and len(x.gen)]
    of_vision = vision_units(model.vision)
    units: list[list[nn.Module]] = [*of_vision.modules, *[list(gen.values()) for gen in skipped]]
    units += [*[[layer] for layer in layers], [model]]
    trains = [any(p.requires_grad for p in parameters) for parameters in parameters_of(units)]
    for unit, unit_trains in zip(units[:-1], trains, strict=False):
        fully_shard(unit, mesh=mesh if unit_trains or config.frozen == "sharded" else unsharded_mesh, **policy)
    # Backward needs the root at once again. None, not True, is FSDP's value for keeping it gathered until then.
    policy["reshard_after_forward"] = None if config.reshard_after_forward else False
    fully_shard(model, mesh=mesh, **policy)
    register_fsdp_forward_method(model, "route")
    by_unit = {cast(FSDPModule, unit[0]): unit_trains for unit, unit_trains in zip(units, trains, strict=True)}
    for module in by_unit:
        # gloo has no pre-multiplied sum. Both setters apply to one unit only.
        module.set_force_sum_reduction_for_comms(True)
        if world.size > 1:  # with one rank torch reads and writes all gradients to divide by it
            module.set_gradient_divide_factor(1.0)
    for last_layer in layers[-1:]:  # backward begins with it
        cast(FSDPModule, last_layer).set_reshard_after_forward(False, recurse=False)
    keep_sizes_constant(model.modules())
    if config.prefetch:
        gather_ahead([unit[0] for unit in of_vision.shared], config.prefetch)
        gather_ahead(layers, config.prefetch)
        # The decoder's first layers, while the last of the encoder run. Router tuning runs no experts and no decoder.
        for before, *_ in (of_vision.experts or of_vision.shared)[-1:]:
            first_layers = [cast(FSDPModule, layer) for layer in layers[: config.prefetch]]
            cast(FSDPModule, before).set_modules_to_forward_prefetch(first_layers)
    return by_unit


def make_meshes(config: EngineConfig, world: World) -> tuple[DeviceMesh, DeviceMesh]:
    """(mesh of sharded units, mesh of units that every rank keeps in full), as replicas x shards.

    Raises UserError where the number of ranks is no multiple of engine.replicate.
    """
    kind, replicas = world.device.type, config.replicate
    if world.size % replicas:
        raise UserError(f"engine.replicate is {replicas}, which does not divide {world.size} processes")
    names = ("replicate", "shard")
    flat = init_device_mesh(kind, (world.size,), mesh_dim_names=names[1:])
    mesh = flat if replicas == 1 else init_device_mesh(kind, (replicas, world.size // replicas), mesh_dim_names=names)
    if config.frozen == "sharded":
        return mesh, mesh
    return mesh, init_device_mesh(kind, (world.size, 1), mesh_dim_names=names)


def gather_ahead(layers: Sequence[nn.Module], count: int) -> None:
    """Let every layer start to gather the next `count` layers, in forward and in backward order."""
    units = [cast(FSDPModule, layer) for layer in layers]
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, index - count) : index][::-1])


def _run_of(weight: DTensor, shard_: Tensor) -> Run:
    """A shard as a run of the flattened parameter: FSDP divides the first dimension, so it is rows."""
    _, offset = local_size_and_offset(weight)
    return Run(shard_, 0, offset[0] * (weight.numel() // weight.shape[0]), shard_.numel())


def _with_placement_of(weight: DTensor, shard_: Tensor) -> DTensor:
    """A plain tensor of this rank as a shard of a tensor with the shape and the placement of `weight`."""
    return DTensor.from_local(
        shard_, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
