"""The norm of eager layers is one kernel on a GPU; it must give what its formula gives, also on no rows."""

import pytest
import torch
from torch import Tensor

from emma_train.model.decoder import RMSNorm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
EPS = 1e-6


def in_float64(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The norm and the gradients of x and weight by the formula."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return [y, *torch.autograd.grad(y, (x, weight), grad.double())]


@pytest.mark.parametrize("shape", [(6176, 2560), (2048, 8, 128), (0, 2560)], ids=["hidden", "heads", "no rows"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
def test_the_norm_and_its_gradients_are_those_of_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, error: float
) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], EPS).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(shape, device="cuda", dtype=dtype)
    y = norm(x)
    got = [y, *torch.autograd.grad(y, (x, norm.weight), grad)]
    for value, exact in zip(got, in_float64(x, norm.weight, grad), strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        assert (value.double() - exact).norm() <= error * exact.norm()
