"""The meta device, or a CPU, takes the way of a card: spans, a variable-length kernel, and norms of one kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emma_train.model import emma, varlen, vision

TORCH = "torch.nn.attention.varlen"


def card_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The body of a fixture: the kernel is torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    yield from _card_with(varlen_attn, monkeypatch)


def card_on_cpu(monkeypatch: pytest.MonkeyPatch, module: str) -> Iterator[None]:
    """The body of a fixture: the kernel of that module has its signature, runs on a CPU and gives q back."""
    standin = _torch_standin if module == TORCH else _flash_standin
    yield from _card_with(standin, monkeypatch, module)


def _card_with(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, module: str = TORCH) -> Iterator[None]:
    monkeypatch.setattr(varlen, "_card", lambda device: 9)
    monkeypatch.setattr(varlen, "_import", lambda kernel: function if kernel.module == module else None)
    monkeypatch.setattr(varlen, "_ready", list(varlen._ready))
    for user in (emma, vision):
        monkeypatch.setattr(user, "select_backend", lambda *_: "flash")
    norms_as_on_a_card(monkeypatch)
    varlen._load_kernel.cache_clear()
    torch._dynamo.reset()
    yield
    varlen._load_kernel.cache_clear()


def norms_as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's rms_norm is one operator, as on CUDA; elsewhere torch takes it apart. It keeps what torch's keeps
    (derivatives.yaml: input, weight and 1 / rms)."""

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        y: Tensor = _norm_operator(x, weight, eps)[0]
        return y

    monkeypatch.setattr(torch.nn.functional, "rms_norm", rms_norm)


@torch.library.custom_op("emma_tests::rms_norm", mutates_args={})
def _norm_operator(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x * scale * weight).to(x.dtype), scale


@_norm_operator.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("emma_tests::rms_norm_backward", mutates_args={})
def _norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normal, to_normal = x * scale, grad * weight
    to_x = (to_normal - normal * (normal * to_normal).mean(-1, keepdim=True)) * scale
    return to_x.to(x.dtype), (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)


@_norm_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    to_x, to_weight = _norm_gradients(grad, *ctx.saved_tensors)
    return to_x, to_weight, None


_norm_operator.register_autograd(_norm_backward, setup_context=_keep_for_norm)


@torch.library.custom_op("emma_tests::standin", mutates_args={})
def _standin_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone()


@_standin_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("emma_tests::standin_backward", mutates_args={})
def _standin_gradients(grad: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad.clone(), torch.zeros_like(k), torch.zeros_like(v)


@_standin_gradients.register_fake
def _(grad: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(k), torch.empty_like(v)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _standin_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _standin_gradients(grad, *ctx.saved_tensors)
    return gradients


_standin_operator.register_autograd(_standin_backward, setup_context=_keep_inputs)


def _flash_standin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    out: Tensor = _standin_operator(q, k, v)
    return out


def _torch_standin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    out: Tensor = _standin_operator(query, key, value)
    return out
