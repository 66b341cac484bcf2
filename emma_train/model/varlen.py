"""Attention over the spans of a pack (sequence/spans.py) by variable-length kernels: no mask, no masked pair computed.

On a GPU the kernel is flash-attn 4, 3 or 2, whichever is installed, or else torch's own; they take bf16 or fp16. On a
CPU every run goes through torch's attention by itself, which proves the spans where there is no GPU.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emma_train.sequence.spans import Spans, VarlenCall

log = logging.getLogger(__name__)
Kernel = Callable[[Tensor, Tensor, Tensor, VarlenCall], Tensor]
FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Modules of flash-attn 4, 3 and 2 that offer flash_attn_varlen_func, the one to be preferred first."""


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """q: [T, heads, d]; k, v: [T, kv_heads, d], in stream order -> [T, heads, d]."""
    kernel = find_kernel(q.device.type)
    q = q.index_select(0, spans.query_order)
    k, v = (_Copied.apply(x, spans.keys, spans.key_copies) for x in (k, v))
    outputs, at_q, at_k = [], 0, 0
    for call in spans.calls:
        rows, seen = slice(at_q, at_q + call.num_q), slice(at_k, at_k + call.num_k)
        outputs.append(kernel(q[rows], k[seen], v[seen], call))
        at_q, at_k = rows.stop, seen.stop
    return torch.cat(outputs).index_select(0, spans.inverse_order)


class _Copied(torch.autograd.Function):
    """Rows by index, some of them repeated. The gradient of a row is the sum over its copies, in float32 and in a fixed
    order, because the atomic adds of torch's backward differ from run to run."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, copies: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(copies)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (copies,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        total = grad.new_zeros(len(copies), *grad.shape[1:], dtype=torch.float32)
        for nth in copies.unbind(1):
            total += padded.index_select(0, nth)
        return total.to(grad.dtype), None, None


@lru_cache
def find_kernel(device: str) -> Kernel:
    """The kernel for a device type, found once and named in the log."""
    if device != "cuda":
        return _one_by_one
    for name in FLASH:
        try:
            function = importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):
            continue
        log.info("attention: %s.flash_attn_varlen_func", name)
        return lambda q, k, v, call: _flash(function, q, k, v, call)
    log.info("attention: torch.nn.attention.varlen")
    return _torch_varlen()


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


def _torch_varlen() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

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
