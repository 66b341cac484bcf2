"""DeepSpeed ZeRO-1/2/3 on gloo/CPU and NCCL/CUDA: fp32 master weights and reduction, bf16 or fp32 compute.

DeepSpeed keeps the trainable parameters of a group as one flat fp32 tensor; here they are views of it by parameter name
(engine/flat_shard.py). It keeps frozen parameters in compute precision only, so this engine keeps their fp32 values in
host memory, divided among the ranks.
"""

import os
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emma_train.config.schema import EngineConfig
from emma_train.engine.adam_state import set_learning_rate
from emma_train.engine.flat_shard import FlatShard, Run
from emma_train.engine.grad_norm import record_squares
from emma_train.engine.muon_adamw import MuonAdamW, optimizer_state
from emma_train.engine.protocol import MakeOptimizer
from emma_train.engine.torch_private import norms
from emma_train.engine.world import World
from emma_train.errors import UserError
from emma_train.metrics import is_recording
from emma_train.model.emma import Emma, Prediction

BUCKET = 2**26
"""Gradient values that are reduced at once: 256 MiB in float32."""
MAX_GATHERED = 10**9
"""Parameters that ZeRO-3 may keep gathered."""


class DeepSpeedEngine:
    """A model under DeepSpeed ZeRO and its optimizer (engine/protocol.py)."""

    def __init__(
        self, model: Emma, config: EngineConfig, max_grad_norm: float, world: World, make_optimizer: MakeOptimizer
    ) -> None:
        """`model` is on the meta device. Raises UserError where DeepSpeed is not installed."""
        deepspeed = import_deepspeed(world.device)
        self._world, self._stage, self._offloads = world, config.zero_stage, config.offload_optimizer
        settings = deepspeed_config(model, config, max_grad_norm, world.device)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        if config.precision == "bf16":
            model.to(torch.bfloat16)
        if config.zero_stage == 3:
            _materialise_in_parts(model, settings, world.device)
        else:
            model.to_empty(device=world.device)
        self._optimizer = make_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad})
        group_of = {id(p): number for number, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
        root = _Root(model)
        if config.zero_stage == 3:
            # Parameters outside of layers are used all over the model. They stay gathered from the start of forward to
            # its end, and again in backward, as the root unit of FSDP does.
            for parameter in _outside_layers(model):
                deepspeed.zero.register_external_parameter(root, parameter)
            if not any(p.requires_grad for p in model.vision.parameters()):
                deepspeed.utils.set_z3_leaf_modules(root, [type(model.vision)])
        self.groups: list[dist.ProcessGroup] = []
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=root, optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        self.model = cast(nn.Module, _ModelThroughDeepSpeed(model, self._deepspeed))
        self._parameters = dict(model.named_parameters())
        self._runs = {n: self._run_of(p, group_of[id(p)]) for n, p in self._parameters.items() if p.requires_grad}
        self._shapes = shapes
        if isinstance(self._optimizer, MuonAdamW):
            self._optimizer.connect(self._runs, shapes, world, world.size)
        self.weights: dict[str, Tensor] = {
            name: self._flat_shard(name) if name in self._runs else _even_share(shape, world)
            for name, shape in shapes.items()
        }

    def accumulate(self, loss: Tensor, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # ZeRO averages over ranks, but the loss is divided by the token counts of the full step already. Ranks that
        # share a pack all have its full loss.
        self._deepspeed.backward(loss * self._world.dp_size, scale_wrt_gas=False)

    def gradient_checksums(self, compute_loss: Callable[[], Tensor]) -> dict[str, int]:
        raise UserError("health.replay needs engine.kind=fsdp: DeepSpeed cannot drop the gradients of one micro-step")

    def step(self, lr: float) -> float:
        set_learning_rate(self._optimizer, lr)
        self._record_squares()
        self._deepspeed.step()
        return inf if self._zero.overflow else float(self._deepspeed.get_global_grad_norm())

    def _record_squares(self) -> None:
        """Record the gradient norms by parameter group. With offload_optimizer, and with ZeRO-1 in bf16, none is:
        DeepSpeed then keeps the gradients elsewhere."""
        if not is_recording() or self._offloads or not hasattr(self._zero, "averaged_gradients"):
            return
        zero, name_of = cast(Any, self._zero), {id(p): name for name, p in self._parameters.items()}
        parameters = zero.fp16_groups if self._stage == 3 else zero.params_in_partition
        parts = {
            name_of[id(parameter)]: gradient
            for group, gradients in zero.averaged_gradients.items()
            for parameter, gradient in zip(parameters[group], gradients or (), strict=False)  # then comes padding
        }
        if parts:
            record_squares(list(parts), torch.stack(norms(list(parts.values()))).double().square(), self._world.sp_size)

    @torch.no_grad()
    def sync_compute_weights(self) -> None:
        frozen = [name for name in self._parameters if name not in self._runs]
        if self._stage < 3:
            self._zero.update_lp_params()
            for name in frozen:
                _gather_into(self._parameters[name], cast(FlatShard, self.weights[name]), self._world)
            return
        self.reshard()
        for name, parameter in self._parameters.items():
            values = cast(FlatShard, self.weights[name]).to_local()
            partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            partition.data[: len(values)].copy_(values)

    def reshard(self) -> None:
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()

    def state(self) -> dict[str, dict[str, Any]]:
        optimizer: dict[str, Any] = {}
        for name, run in self._runs.items():
            for key, value in optimizer_state(self._optimizer, name, run.flat).items():
                optimizer[f"{name}.{key}"] = value if key == "step" else self._flat_shard(name, value)
        return {"model": dict(self.weights), "optimizer": optimizer}

    def close(self) -> None:
        """Remove hooks on parameters and clear a global list of models: both would keep the model in memory."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._deepspeed.destroy()
        FWD_MODULE_STACK.clear()

    def _run_of(self, parameter: Tensor, group: int) -> Run:
        zero: Any = self._zero
        if self._stage == 3:
            number, first, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = min(self._world.rank * padded, parameter.ds_numel)  # type: ignore[attr-defined]
            length = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return Run(zero.fp32_partitioned_groups_flat[number], first, start, length)
        (flat,) = self._optimizer.param_groups[group]["params"]
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Run(flat, 0, 0, 0)
        in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Run(flat, in_flat.start, in_parameter.start, in_flat.numel)

    def _flat_shard(self, name: str, values: Tensor | None = None) -> FlatShard:
        """This rank's fp32 values of a trainable parameter: a view of optimizer memory. With `values`, a tensor of the
        same layout as the optimizer's, such as a moment, those of it."""
        flat, first, start, length = self._runs[name]
        values = flat if values is None else values
        return FlatShard(values.detach()[first : first + length], start, self._shapes[name])


class _Root(nn.Module):
    """The module that DeepSpeed wraps: its forward pass calls any method of the model and returns plain tensors."""

    def __init__(self, model: Emma) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        result = getattr(self.model, method)(*args, **kwargs)
        values = result._asdict() if isinstance(result, Prediction) else {"result": result}
        return {name: value for name, value in values.items() if value is not None}


class _ModelThroughDeepSpeed:
    """The model for the rest of the trainer: forward passes go through DeepSpeed. Beside them it has what the trainer
    uses of a module."""

    def __init__(self, model: Emma, engine: Any) -> None:
        self._engine = engine
        self.vision = model.vision
        self.train = model.train
        self.parameters = model.parameters
        self.named_parameters = model.named_parameters
        self.named_modules = model.named_modules

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        values = self._engine("__call__", *args, **kwargs)
        return Prediction(**{name: values.get(name) for name in Prediction._fields})

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self._engine("route", *args, **kwargs)["result"]
        return logits


def deepspeed_config(model: Emma, config: EngineConfig, max_grad_norm: float, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "contiguous_gradients": True,
        # Keep vectors gathered, which are too small to be gathered one by one, but no matrices.
        "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.ndim == 1),
        "stage3_max_reuse_distance": 0 if config.reshard_after_forward else MAX_GATHERED,
        "stage3_max_live_parameters": MAX_GATHERED,
        # True would replace torch.nn.functional.linear in the whole process.
        "memory_efficient_linear": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        # `accumulate` sets the accumulation boundary itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, set up for a device type. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.kind is deepspeed, which cannot be imported ({error}); "
            f"install it (pip install -c constraints.txt -e '.[deepspeed]') or set engine.kind=fsdp"
        ) from None
    # The vision encoder returns a dataclass, in which ZeRO-3 finds no tensors and warns. It is harmless: the root
    # gathers what backward needs of its parameters.
    deepspeed.utils.logger.addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())
    # Reductions in shared memory are for inference on CPUs, and would need a C++ compiler at run time.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _materialise_in_parts(model: Emma, settings: dict[str, Any], device: torch.device) -> None:
    """Allocate a model that is on the meta device and partition it among the ranks, one module after the other."""
    import deepspeed

    for module in reversed(list(model.modules())):
        module.to_empty(device=device, recurse=False)
        parameters = list(module.parameters(recurse=False))
        if parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=parameters[0].dtype)


def _outside_layers(model: Emma) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if not name.startswith(("decoder.layers.", "vision.layers.", "vision.stem_layers.")):
            yield parameter


def _even_share(shape: torch.Size, world: World) -> FlatShard:
    """Uninitialised host memory for this rank's share of a parameter that is divided evenly among the ranks."""
    count = -(-shape.numel() // world.size)
    start = min(world.rank * count, shape.numel())
    return FlatShard(torch.empty(min(count, shape.numel() - start)), start, shape)


def _gather_into(parameter: Tensor, share: FlatShard, world: World) -> None:
    """Fill a parameter from the shares of all ranks."""
    count = -(-parameter.numel() // world.size)
    values = parameter.new_empty(count * world.size)
    padded_share = values.new_zeros(count)
    padded_share[: len(share.to_local())].copy_(share.to_local())
    dist.all_gather_into_tensor(values, padded_share)
    parameter.copy_(values[: parameter.numel()].view_as(parameter))
