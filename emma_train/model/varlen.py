"""Attention over the spans of a pack (sequence/spans.py) by variable-length kernels: no mask, no masked pair computed.

On a GPU the kernel is the first of `KERNELS` that is installed and right for the card and the size of the heads; it
takes bf16 or fp16. On a CPU torch's attention computes the runs one by one, which tests the spans without a GPU.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emma_train.errors import UserError
from emma_train.sequence.spans import Spans, VarlenCall

log = logging.getLogger(__name__)
Kernel = Callable[[Tensor, Tensor, Tensor, VarlenCall], Tensor]


@dataclass(frozen=True)
class FlashKernel:
    """A kernel of variable-length attention, and where its output and its gradients are right."""

    module: str
    """The module that offers `function`."""
    cards: tuple[int, ...]
    """Major compute capabilities: 8 Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    head_dim_multiple: int
    """head_dim is a multiple of this."""
    max_head_dim: int
    function: str = "flash_attn_varlen_func"
    traceable: bool = True
    """Whether its operators are registered with torch, so that torch.compile keeps them in its graph."""

    def supports(self, card: int, head_dim: int) -> bool:
        """Whether it is right for heads of this size on a card of this major compute capability."""
        return card in self.cards and head_dim % self.head_dim_multiple == 0 and head_dim <= self.max_head_dim


KERNELS = (
    # flash-attn 3, built for Hopper. Its kernels pad 72 to 96 inside (flash-attention, hopper/README).
    FlashKernel("flash_attn_interface", cards=(9,), head_dim_multiple=8, max_head_dim=256),
    # flash-attn 4. On Hopper the gradient of q is wrong unless 32 divides head_dim: the kernel pads heads to a multiple
    # of 16, the buffer of dq to one of 32 (flash-attention PR #2896: 72 and 104; #2698 was the same on Blackwell).
    FlashKernel("flash_attn.cute", cards=(9, 10), head_dim_multiple=32, max_head_dim=128, traceable=False),
    # flash-attn 2: head_dim a multiple of 8, up to 256 (flash-attention, README).
    FlashKernel("flash_attn", cards=(8, 9, 10, 12), head_dim_multiple=8, max_head_dim=256),
    # torch's copy of flash-attn 2, which is always there.
    FlashKernel("torch.nn.attention.varlen", (8, 9, 10, 12), 8, 256, function="varlen_attn"),
)
"""The preferred one first."""


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """q: [T, heads, d]; k, v: [T, kv_heads, d], in stream order -> [T, heads, d]."""
    kernel = find_kernel(q.device, q.shape[-1])
    q = _Permuted.apply(q, spans.query_order, spans.inverse_order)
    k, v = (_Copied.apply(x, spans.keys, spans.key_copies) for x in (k, v))
    queries = q.split([call.num_q for call in spans.calls])
    keys, values = (x.split([call.num_k for call in spans.calls]) for x in (k, v))
    outputs = map(kernel, queries, keys, values, spans.calls)
    out: Tensor = _Permuted.apply(torch.cat(list(outputs)), spans.inverse_order, spans.query_order)
    return out


class _Permuted(torch.autograd.Function):
    """Rows in another order, each once. Its gradient is read by the inverse order. torch's backward of `index_select`
    adds rows to zeros instead, which takes 240 us where this takes 42 (6.2 k tokens, 32 heads of 128, H100)."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Copied(torch.autograd.Function):
    """Rows by index, some of them repeated. The gradient of a row is the sum over its copies, which torch adds up in
    float32 and in a fixed order; the atomic adds of its backward of `index_select` differ from run to run."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, copies: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(copies)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (copies,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        return padded[copies].sum(1), None, None


def choose_kernel(card: int, head_dim: int, is_installed: Callable[[FlashKernel], bool]) -> FlashKernel | None:
    """The first kernel of the table that is installed and right for heads of this size; None where there is none."""
    return next((kernel for kernel in KERNELS if kernel.supports(card, head_dim) and is_installed(kernel)), None)


def find_kernel(device: torch.device, head_dim: int) -> Kernel:
    """The kernel for heads of this size on a device. Raises UserError where there is none."""
    return _ready[_kernel_number(device, head_dim)]


def kernel_name(device: torch.device, head_dim: int) -> str:
    """What computes attention over spans there: the module of a kernel, or "torch, run by run" on a CPU."""
    number = _kernel_number(device, head_dim)
    return KERNELS[number].module if number < len(KERNELS) else "torch, run by run"


# torch.compile cannot trace an import. It runs this function while it traces, and keeps the number.
@torch.compiler.assume_constant_result
def _kernel_number(device: torch.device, head_dim: int) -> int:
    """Index into `_ready`, where the kernel is loaded now."""
    return _load_kernel(device, head_dim)


@lru_cache
def _load_kernel(device: torch.device, head_dim: int) -> int:
    if (card := _card(device)) is None:
        return len(KERNELS)
    kernel = choose_kernel(card, head_dim, lambda candidate: _import(candidate) is not None)
    if kernel is None or (function := _import(kernel)) is None:
        raise UserError(
            f"attention.backend=flash has no kernel for heads of {head_dim} on cards of compute capability {card}; "
            f"use attention.backend=flex"
        )
    log.info("attention with heads of %d: %s.%s", head_dim, kernel.module, kernel.function)
    number = KERNELS.index(kernel)
    _ready[number] = _adapted(kernel, function)
    return number


def _adapted(kernel: FlashKernel, function: Callable) -> Kernel:
    if kernel.function == "varlen_attn":
        return _torch_varlen(function)
    if not kernel.traceable:
        function = torch.compiler.disable(function)
    return lambda q, k, v, call: _flash(function, q, k, v, call)


def _card(device: torch.device) -> int | None:
    """The major compute capability of a card; None of a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def _import(kernel: FlashKernel) -> Callable | None:
    """The kernel's function; None where it is not installed or does not load."""
    try:
        return getattr(importlib.import_module(kernel.module), kernel.function)
    except (ImportError, AttributeError, OSError):
        return None


def _flash(function: Callable, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        causal=call.causal,
    )
    return out[0] if isinstance(out, tuple) else out


def _torch_varlen(varlen_attn: Callable) -> Kernel:
    # torch 2.11 has neither grouped heads nor, in its first form, windows.
    names = inspect.signature(varlen_attn).parameters
    grouped = "enable_gqa" in names

    def kernel(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if not grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if "window_size" in names:
            options["window_size"] = (-1, 0) if call.causal else (-1, -1)
        else:
            options["is_causal"] = call.causal
        out = varlen_attn(
            q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k, **options
        )
        assert isinstance(out, Tensor)
        return out

    return kernel


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    lengths = [starts.diff().tolist() for starts in (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k)]
    outputs = []
    for q_run, k_run, v_run in zip(*(x.split(sizes) for x, sizes in zip((q, k, v), lengths, strict=True)), strict=True):
        q_run, k_run, v_run = (x.transpose(0, 1).unsqueeze(0).float() for x in (q_run, k_run, v_run))
        num_q, num_k = q_run.shape[2], k_run.shape[2]
        mask = torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q) if call.causal else None
        out = F.scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


_ready: list[Kernel] = [_one_by_one] * (len(KERNELS) + 1)
"""The kernels of the table once they are loaded, and the CPU's. A list of fixed length: torch.compile would compile
anew when it grows."""
