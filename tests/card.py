"""The meta device, or a CPU, takes the way of a card: spans, and a variable-length kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emma_train.model import emma, varlen, vision


def card_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The body of a fixture: the kernel is torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    yield from _card_with(varlen_attn, monkeypatch)


def card_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The body of a fixture: the kernel has torch's signature, runs on a CPU and gives q back."""
    yield from _card_with(_standin, monkeypatch)


def _card_with(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(varlen, "_card", lambda device: 9)
    monkeypatch.setattr(varlen, "_import", lambda kernel: function if kernel.function == "varlen_attn" else None)
    monkeypatch.setattr(varlen, "_ready", list(varlen._ready))
    for module in (emma, vision):
        monkeypatch.setattr(module, "select_backend", lambda *_: "flash")
    varlen._load_kernel.cache_clear()
    torch._dynamo.reset()
    yield
    varlen._load_kernel.cache_clear()


@torch.library.custom_op("emma_tests::standin", mutates_args={})
def _standin_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone()


@_standin_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _keep_shapes(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.shapes = [x.shape for x in inputs[1:]]


def _standin_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *(grad.new_zeros(shape) for shape in ctx.shapes)


_standin_operator.register_autograd(_standin_backward, setup_context=_keep_shapes)


def _standin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    out: Tensor = _standin_operator(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), v)
    return out
