"""Products in 8-bit floats, emulated: within the bound that rounding allows, on any number of rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_train.engine import fp8_linear
from emma_train.engine.compiled import num_graphs
from emma_train.engine.fp8_linear import E4M3, E5M2, Fp8Linear, quantize
from tests.helpers import kept_bytes

WIDE, NARROW = 96, 64
ROUNDING = {E4M3: (2**-4, 2**-10 / 224), E5M2: (2**-3, 2**-17 / 28672)}
"""Largest error of a value in 8 bits: as a share of it, and, of the small ones, as a share of the largest, which is
scaled to more than half of the range."""
BF16 = 2**-8


def linear(rowwise: bool, bias: bool = True) -> Fp8Linear:
    torch.manual_seed(0)
    module = nn.Linear(NARROW, WIDE, bias=bias, dtype=torch.bfloat16)
    module.__class__ = Fp8Linear
    assert isinstance(module, Fp8Linear)
    module.rowwise = rowwise
    return module


def operands(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and a gradient of y in bf16; rows and columns of all sizes, and one row of zeros where there are several."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(rows, size, generator=generator) for size in (NARROW, WIDE))
    x *= torch.logspace(-3, 3, rows)[:, None] if rows > 1 else 1
    grad *= 1e-6 * torch.logspace(-2, 2, WIDE)
    if rows > 2:
        x[1], grad[2] = 0, 0
    return x.bfloat16().requires_grad_(), grad.bfloat16()


def with_gradients(module: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), grad)]


def bound(a: Tensor, b: Tensor, kind: torch.dtype, rowwise: bool) -> Tensor:
    """Largest error of each entry of a b', a rounded to `kind` and b to E4M3, and the result to bf16."""

    def error(t: Tensor, kind: torch.dtype) -> Tensor:
        share, of_largest = ROUNDING[kind]
        largest = t.abs().amax(-1, keepdim=True) if rowwise else t.abs().amax()
        return torch.maximum(share * t.abs(), of_largest * largest)

    a, b = a.detach().double(), b.detach().double()
    error_a, error_b = error(a, kind), error(b, E4M3)
    error_product = error_a @ b.abs().T + a.abs() @ error_b.T + error_a @ error_b.T
    return error_product + BF16 * ((a @ b.T).abs() + error_product)


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize("rows", [1, 16, 17, 333])
def test_every_entry_is_within_the_bound_of_rounding(rows: int, rowwise: bool) -> None:
    module, (x, grad) = linear(rowwise, bias=False), operands(rows)
    y, to_x, to_weight = with_gradients(module, x, grad)
    exact = nn.Linear(NARROW, WIDE, bias=False, dtype=torch.float64)
    exact.weight.data.copy_(module.weight)
    want = with_gradients(exact, x.detach().double().requires_grad_(), grad.double())
    weight, kind = module.weight, E4M3 if rowwise else E5M2
    bounds = [
        bound(x, weight, E4M3, rowwise),
        bound(grad, weight.t(), kind, rowwise),
        bound(grad.t(), x.t(), kind, rowwise),
    ]
    for value, reference, limit in zip((y, to_x, to_weight), want, bounds, strict=True):
        assert value.dtype == torch.bfloat16 and value.shape == reference.shape
        assert bool(((value.double() - reference).abs() <= limit).all())


@pytest.mark.parametrize(("rowwise", "forward", "backward"), [(False, 0.04, 0.065), (True, 0.04, 0.04)])
def test_the_error_of_a_product_of_normal_values(rowwise: bool, forward: float, backward: float) -> None:
    """Norm of the error over the norm. Measured: 3.6 % with E4M3 twice, 5.9 % with E5M2 for the gradient."""
    module, generator = linear(rowwise), torch.Generator().manual_seed(1)
    x = torch.randn(333, NARROW, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(333, WIDE, generator=generator).bfloat16()
    exact = nn.Linear(NARROW, WIDE, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    got = with_gradients(module, x, grad)
    want = with_gradients(exact, x.detach().double().requires_grad_(), grad.double())
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert 0.02 < errors[0] < forward and all(0.02 < error < backward for error in errors[1:3])
    assert errors[3] < BF16  # the bias takes no part


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_what_fits_8_bits_is_multiplied_exactly(rowwise: bool) -> None:
    """Small integers times powers of two; the gradient of E5M2 takes few of them."""
    module, generator = linear(rowwise, bias=False), torch.Generator().manual_seed(2)
    with torch.no_grad():
        module.weight.copy_(torch.randint(-4, 5, module.weight.shape, generator=generator) * 2.0**-9)
    x = (torch.randint(-4, 5, (37, NARROW), generator=generator) * 2.0**7).bfloat16().requires_grad_()
    grad = (torch.randint(-2, 3, (37, WIDE), generator=generator) * 2.0**-30).bfloat16()
    plain = nn.Linear(NARROW, WIDE, bias=False, dtype=torch.float64)
    plain.load_state_dict({"weight": module.weight.double()})
    want = with_gradients(plain, x.detach().double().requires_grad_(), grad.double())
    for value, reference in zip(with_gradients(module, x, grad), want, strict=True):
        assert torch.equal(value, reference.bfloat16())


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_no_rows_give_gradients_of_zeros_as_a_plain_linear_does(rowwise: bool) -> None:
    module = linear(rowwise)
    plain = nn.Linear(NARROW, WIDE, dtype=torch.bfloat16)
    x, grad = operands(0)
    for value, reference in zip(with_gradients(module, x, grad), with_gradients(plain, x, grad), strict=True):
        assert (value.shape, value.dtype) == (reference.shape, reference.dtype)
        assert not value.any() and not reference.any()


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(rowwise: bool, bad: float) -> None:
    """Or the check of the gradients' norm would not see it."""
    module, (x, grad) = linear(rowwise), operands(20)
    with torch.no_grad():
        x[3, 5] = bad
    y, _, to_weight, _ = with_gradients(module, x, grad)
    assert not y[3].isfinite().any() and not to_weight[:, 5].isfinite().all()
    x, grad = operands(20)
    grad[4, 7] = bad
    _, to_x, to_weight, _ = with_gradients(module, x, grad)
    assert not to_x[4].isfinite().any() and not to_weight[7].isfinite().any()


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_a_scale_is_a_power_of_two_and_uses_the_range(rowwise: bool, kind: torch.dtype) -> None:
    x = operands(50)[0].detach()
    values, scale = quantize(x, kind, rowwise)
    assert scale.shape == ((50, 1) if rowwise else ()) and bool((scale.frexp()[0] == 0.5).all())
    largest = values.float().abs().amax(-1) if rowwise else values.float().abs().amax()[None]
    used = largest[largest > 0] / torch.finfo(kind).max
    assert bool((used > 0.49).all()) and bool((used <= 1).all())


def test_without_gradients_it_is_a_plain_linear_bit_for_bit() -> None:
    module, (x, _) = linear(rowwise=True), operands(20)
    plain = F.linear(x, module.weight, module.bias)
    with torch.no_grad():
        assert torch.equal(module(x), plain)
    assert not torch.equal(module(x), plain)


@pytest.mark.parametrize("trains", [True, False])
def test_backward_keeps_no_more_than_without_fp8(trains: bool) -> None:
    """No input where the weight is frozen."""
    module, (x, _) = linear(rowwise=False), operands(200)
    plain = nn.Linear(NARROW, WIDE, dtype=torch.bfloat16)
    for one in (module, plain):
        one.requires_grad_(trains)
    kept = [kept_bytes(one, lambda one=one: one(x)) for one in (module, plain)]  # type: ignore[misc]
    assert kept[0] == kept[1]


@pytest.mark.seconds
@pytest.mark.parametrize("rowwise", [False, True], ids=["tensorwise", "rowwise"])
def test_compiled_for_a_card_it_is_one_graph_for_all_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch, rowwise: bool
) -> None:
    """torch multiplies 8-bit floats on a CPU too, by another kernel: here the graph is that of a card."""
    monkeypatch.setattr(fp8_linear, "has_kernel", lambda device: True)
    torch._dynamo.reset()
    module, before = linear(rowwise), num_graphs()
    with torch._dynamo.config.patch(specialize_float=True):  # as engine/torch_private.py sets it
        compiled = torch.compile(module.forward, dynamic=True, fullgraph=True, backend="aot_eager")
        for rows in (33, 48, 17, 160, 63, 64):
            x, grad = operands(rows)
            y = compiled(x)
            got = [y, *torch.autograd.grad(y, (x, *module.parameters()), grad)]
            for value, reference in zip(got, with_gradients(module, x, grad), strict=True):
                assert torch.equal(value, reference)
    assert num_graphs() - before == 1
    torch._dynamo.reset()
