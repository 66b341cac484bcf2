"""Every use that the trainer makes of torch's private API. After an upgrade of torch, look here first."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils import _triton


def default_store() -> dist.Store:
    """The key-value store of the default process group."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def set_group_timeout(group: dist.ProcessGroup | None, seconds: int) -> None:
    """Change how long collectives of a group may take; None is the default group."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def local_size_and_offset(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and offset of this rank's shard in the full tensor."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def make_wrapper_tensor(cls: type, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass with a shape and no memory of its own."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norm of each tensor, all in one kernel."""
    return list(torch._foreach_norm(list(tensors)))


def scale_in_place(tensors: Sequence[Tensor], factor: float) -> None:
    """tensor <- factor * tensor, for all in one kernel."""
    torch._foreach_mul_(list(tensors), factor)


def lerp_in_place(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """tensor <- tensor + weight * (end - tensor), for all in one kernel."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [m, k] @ b [k, n], both in 8 bits, times their scales, in one kernel. Rows of `a` and columns of `b` lie one
    after another in memory. `fast` adds up with fewer bits on Hopper."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def has_triton() -> bool:
    return bool(_triton.has_triton())


def raise_recompile_limit(limit: int) -> None:
    """Allow torch.compile at least so many graphs of one function."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def avoid_wrong_code() -> None:
    """Switch off what torch.compile gets wrong. torch 2.11 writes the rows of a mix-order reduction into the code
    without brackets, so that the backward pass ends with "shape '[2048, 128]' is invalid" where the rows are those of
    the Gen branch, T - num_und; 2.13 has the brackets."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        from torch._inductor import config  # takes a second to import

        config.triton.mix_order_reduction = False


def keep_sizes_constant(modules: Iterable[nn.Module]) -> None:
    """Let torch.compile take the integers and floats of modules (heads, sizes, epsilons) as constants, as it does of
    all modules but FSDP's. Of those it makes variables, so that not even the size of a head is known when kernels are
    made. Call it after sharding."""
    torch._dynamo.config.specialize_float = True
    for module in modules:
        module._is_fsdp_managed_module = False  # type: ignore[assignment]


def num_compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


EXCHANGE_OPERATORS: dict[Any, tuple[str, int]] = {
    torch.ops.c10d._allgather_base_.default: ("all-gather", 0),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
    torch.ops.c10d.allreduce_.default: ("all-reduce", 0),
}
"""Operators of FSDP's collectives: their kind, and which argument is the complete tensor, or a list of some."""


def join_fake_group(num_ranks: int) -> dist.ProcessGroup:
    """Be rank 0 of a process group that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    return dist.distributed_c10d._get_default_group()


def tensors_without_memory() -> AbstractContextManager[Any]:
    """Tensors made inside have shapes and devices, but no values; others may be used beside them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
