"""DeepSpeed ZeRO-1/2/3 on gloo/CPU and NCCL/CUDA: fp32 master weights and reduction, bf16 or fp32 compute.

DeepSpeed keeps what trains as runs of fp32 values, which are seen by parameter name here (engine/fragment.py). What is
frozen it keeps in compute precision alone, so its fp32 values stay beside it in host memory, divided among the ranks.
"""

import os
from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emma_train.config.schema import EngineConfig
from emma_train.engine.adam_state import MOMENTS, adam_state, set_learning_rate
from emma_train.engine.flat_shard import FlatShard
from emma_train.engine.protocol import MakeOptimizer
from emma_train.engine.world import World
from emma_train.errors import UserError
from emma_train.model.emma import Emma, Prediction

BUCKET = 2**26
"""Gradients that are reduced at once: 256 MiB in float32."""
KEPT = 10**9
"""Parameters that ZeRO-3 may hold gathered."""


class Run(NamedTuple):
    """Where the optimizer has this rank's fp32 values of a parameter."""

    flat: Tensor
    """1-D, of many parameters."""
    first: int
    """Of the run in `flat`."""
    start: int
    """Of the run in the parameter."""
    length: int


class DeepSpeedEngine:
    """A model under ZeRO and its optimizer (engine/protocol.py)."""

    def __init__(
        self, model: Emma, config: EngineConfig, max_grad_norm: float, world: World, make_optimizer: MakeOptimizer
    ) -> None:
        """`model` is on the meta device. Raises UserError where DeepSpeed is not installed."""
        deepspeed = import_deepspeed(world.device)
        self._world, self._stage = world, config.zero_stage
        settings = settings_of(model, config, max_grad_norm, world.device)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        if config.precision == "bf16":
            model.to(torch.bfloat16)
        if config.zero_stage == 3:
            _materialise_in_parts(model, settings, world.device)
        else:
            model.to_empty(device=world.device)
        self._adam = make_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad})
        group_of = {id(p): number for number, g in enumerate(self._adam.param_groups) for p in g["params"]}
        root = _Root(model)
        if config.zero_stage == 3:
            # What belongs to no layer is used all over the model: gathered from the start of forward to its end, and
            # again for backward, as the root unit of FSDP is.
            for parameter in _outside_layers(model):
                deepspeed.zero.register_external_parameter(root, parameter)
            if not any(p.requires_grad for p in model.vision.parameters()):
                deepspeed.utils.set_z3_leaf_modules(root, [type(model.vision)])
        self.groups: list[dist.ProcessGroup] = []
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=root, optimizer=self._adam, config=settings, dist_init_required=False
        )
        self.model = cast(nn.Module, _Front(model, self._deepspeed))
        self._parameters = dict(model.named_parameters())
        self._runs = {n: self._run(p, group_of[id(p)]) for n, p in self._parameters.items() if p.requires_grad}
        self._shapes = shapes
        self.weights: dict[str, Tensor] = {
            name: self._fragment(name) if name in self._runs else _share(shape, world) for name, shape in shapes.items()
        }

    def accumulate(self, loss: Tensor, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # ZeRO averages over ranks; the loss account has divided by the counts of the whole step already. Those that
        # share a pack have its whole loss.
        self._deepspeed.backward(loss * self._world.dp_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        set_learning_rate(self._adam, lr)
        self._deepspeed.step()
        return inf if self._zero.overflow else float(self._deepspeed.get_global_grad_norm())

    @torch.no_grad()
    def sync_compute_weights(self) -> None:
        frozen = [name for name in self._parameters if name not in self._runs]
        if self._stage < 3:
            self._zero.update_lp_params()
            for name in frozen:
                _gather(cast(FlatShard, self.weights[name]), self._parameters[name], self._world)
            return
        self.reshard()
        for name, parameter in self._parameters.items():
            own = cast(FlatShard, self.weights[name]).to_local()
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            part.data[: len(own)].copy_(own)

    def reshard(self) -> None:
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()

    def state(self) -> dict[str, dict[str, Any]]:
        optimizer: dict[str, Any] = {}
        for name, run in self._runs.items():
            optimizer[f"{name}.step"] = adam_state(self._adam, run.flat)["step"]
            optimizer |= {f"{name}.{moment}": self._fragment(name, moment) for moment in MOMENTS}
        return {"model": dict(self.weights), "optimizer": optimizer}

    def close(self) -> None:
        """Hooks on parameters, and a list of models of this process, would hold the model for ever."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._deepspeed.destroy()
        FWD_MODULE_STACK.clear()

    def _run(self, parameter: Tensor, group: int) -> Run:
        zero: Any = self._zero
        if self._stage == 3:
            number, first, padded = zero.grad_position[zero.get_param_id(parameter)]
            start = min(self._world.rank * padded, parameter.ds_numel)  # type: ignore[attr-defined]
            length = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
            return Run(zero.fp32_partitioned_groups_flat[number], first, start, length)
        (flat,) = self._adam.param_groups[group]["params"]
        place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if place is None:
            return Run(flat, 0, 0, 0)
        mine, its = place.hp_fragment_address, place.lp_fragment_address
        return Run(flat, mine.start, its.start, mine.numel)

    def _fragment(self, name: str, moment: str | None = None) -> FlatShard:
        """This rank's fp32 values of a parameter that trains, or of one of its moments: the optimizer's own memory."""
        flat, first, start, length = self._runs[name]
        values = flat if moment is None else adam_state(self._adam, flat)[moment]
        return FlatShard(values.detach()[first : first + length], start, self._shapes[name])


class _Root(nn.Module):
    """What DeepSpeed sees: any method of the model as a forward pass of its own, with plain tensors coming out."""

    def __init__(self, model: Emma) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        found = getattr(self.model, method)(*args, **kwargs)
        values = found._asdict() if isinstance(found, Prediction) else {"found": found}
        return {name: value for name, value in values.items() if value is not None}


class _Front:
    """What we see: the model, with its calls led through DeepSpeed."""

    def __init__(self, model: Emma, engine: Any) -> None:
        self._model, self._engine = model, engine

    def __call__(self, *args: Any, **kwargs: Any) -> Prediction:
        values = self._engine("__call__", *args, **kwargs)
        return Prediction(**{name: values.get(name) for name in Prediction._fields})

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self._engine("route", *args, **kwargs)["found"]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def settings_of(model: Emma, config: EngineConfig, max_grad_norm: float, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "contiguous_gradients": True,
        # Vectors are too small to be gathered one by one; matrices are not kept.
        "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.ndim == 1),
        # What is needed again soon may stay gathered, or not.
        "stage3_max_reuse_distance": 0 if config.reshard_after_forward else KEPT,
        "stage3_max_live_parameters": KEPT,
        # It would replace torch's linear for the whole process.
        "memory_efficient_linear": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        # How many packs make a step is said at every backward.
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
    """The package, told which device to use. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.kind is deepspeed, which cannot be imported ({error}); "
            f"install it (pip install -c constraints.txt -e '.[deepspeed]') or set engine.kind=fsdp"
        ) from None
    # The vision encoder gives its tensors in a dataclass, where ZeRO-3 does not find them; what backward needs of its
    # own parameters is gathered by the root.
    deepspeed.utils.logger.addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())
    # Reductions in shared memory serve inference on CPUs alone, and would need a C++ compiler at run time.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _materialise_in_parts(model: Emma, settings: dict[str, Any], device: torch.device) -> None:
    """Memory for a model on the meta device, of which every rank keeps its part: whole for one module at a time."""
    import deepspeed

    for module in reversed(list(model.modules())):
        module.to_empty(device=device, recurse=False)
        own = list(module.parameters(recurse=False))
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=own[0].dtype)


def _outside_layers(model: Emma) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if not name.startswith(("decoder.layers.", "vision.layers.", "vision.stem_layers.")):
            yield parameter


def _share(shape: torch.Size, world: World) -> FlatShard:
    """Host memory for this rank's even share of a parameter."""
    count = -(-shape.numel() // world.size)
    start = min(world.rank * count, shape.numel())
    return FlatShard(torch.empty(min(count, shape.numel() - start)), start, shape)


def _gather(share: FlatShard, parameter: Tensor, world: World) -> None:
    """Fill a whole parameter from all ranks' shares."""
    count = -(-parameter.numel() // world.size)
    whole = parameter.new_empty(count * world.size)
    own = whole.new_zeros(count)
    own[: len(share.to_local())].copy_(share.to_local())
    dist.all_gather_into_tensor(whole, own)
    parameter.copy_(whole[: parameter.numel()].view_as(parameter))
