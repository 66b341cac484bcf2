"""The meta device, or a CPU, takes the way of a card: spans, and a variable-length kernel."""

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
