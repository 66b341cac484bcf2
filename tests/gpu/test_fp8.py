"""The card's product of 8-bit floats is the emulated one, for all numbers of rows, eager and compiled."""

import pytest
import torch
from torch import Tensor, nn

from emma_train.engine import fp8_linear
from emma_train.engine.compiled import num_graphs
from emma_train.engine.fp8_linear import Fp8Linear, card_has_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and card_has_fp8(torch.device("cuda"))), reason="needs a GPU with fp8"
    ),
]
WIDE, NARROW = 1024, 2560
ROWS = (1, 16, 33, 2048, 2049)


def linear(rowwise: bool) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(NARROW, WIDE, device="cuda", dtype=torch.bfloat16)
    module.__class__ = Fp8Linear
    module.rowwise = rowwise  # type: ignore[assignment]
    return module


def with_gradients(module: nn.Linear, rows: int, compiled: bool = False) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    x, grad = (torch.randn(rows, n, device="cuda", generator=generator).bfloat16() for n in (NARROW, WIDE))
    x.requires_grad_()
    y = torch.compile(module.forward, dynamic=True, fullgraph=True)(x) if compiled else module(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), grad * 1e-6)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_the_kernel_computes_what_the_emulation_does(
    monkeypatch: pytest.MonkeyPatch, rowwise: bool, compiled: bool
) -> None:
    """Both multiply the same 8-bit values; they add up in another order, and Hopper with fewer bits in forward."""
    module, graphs = linear(rowwise), num_graphs()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=True):  # as engine/torch_private.py sets it
        got = [with_gradients(module, rows, compiled) for rows in ROWS]
    assert num_graphs() - graphs <= 2 * compiled  # one row, and more
    monkeypatch.setattr(fp8_linear, "has_kernel", lambda device: False)
    for rows, values in zip(ROWS, got, strict=True):
        for value, emulated in zip(values, with_gradients(module, rows), strict=True):
            assert value.dtype == emulated.dtype and value.shape == emulated.shape
            assert (value.double() - emulated.double()).norm() <= 0.005 * emulated.double().norm()
