"""A linear whose products are computed in 8-bit floats.

A linear has three products: y = x Wᵀ, and in backward dx = dy W and dW = dyᵀ x. Both operands of each are scaled,
rounded to 8 bits and multiplied by one kernel, which adds up in float32 and rounds to bf16. Scales are computed anew
for every product, from its operands alone, so there is nothing to save or to resume. Weight and gradients have the
types that they have without fp8, so sharding, optimizer, averages and checkpoints see no difference.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emma_train.engine.torch_private import scaled_mm

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""The kernel takes sums, and rows of the second operand, whose numbers are multiples of this."""
LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first NVIDIA cards with 8-bit products (Ada; Hopper is 9.0)."""
LEAST_MAXIMUM = 1e-30
"""Zeros are scaled as if this were the largest value, so that no scale is infinite."""
EXPONENT_BITS = -(1 << 23)
"""Sign and exponent of a float32."""


class Fp8Linear(nn.Linear):
    """Multiplies in 8 bits where gradients are computed. Validation and samples compute in bf16, as exports do."""

    rowwise: bool
    """Whether each row of an operand, along which a product sums, has its scale; otherwise an operand has one."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        # The kernel fails on no rows, which an idle branch has; the usual product gives gradients of zeros there.
        if len(x) == 0 or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Fp8Product.apply(x, self.weight, self.rowwise)
        return y if self.bias is None else y + self.bias


class _Fp8Product(torch.autograd.Function):
    """x [m, k] times the transpose of weight [n, k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rowwise: bool) -> Tensor:
        # A frozen weight needs no input in backward, as without fp8.
        to_x, to_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        ctx.rowwise = rowwise
        return multiply(x, weight, rowwise, E4M3, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # Most gradients are far smaller than the largest: under one scale they need the larger range of E5M2.
        kind = E4M3 if ctx.rowwise else E5M2
        of_x = None if weight is None else multiply(grad, weight.t(), ctx.rowwise, kind)
        of_weight = None if x is None else multiply(grad.t(), x.t(), ctx.rowwise, kind)
        return of_x, of_weight, None


def multiply(a: Tensor, b: Tensor, rowwise: bool, kind: torch.dtype, fast: bool = False) -> Tensor:
    """a [m, k] times the transpose of b [n, k], with a rounded to `kind` and b to E4M3: [m, n] in the type of a.

    n is a multiple of MULTIPLE. `fast` lets a Hopper card add up with fewer bits, which is usual in forward.
    """
    (a8, scale_a), (b8, scale_b) = quantize(a, kind, rowwise), quantize(b, E4M3, rowwise)
    a8, b8 = _padded(a8), _padded(b8)
    if has_kernel(a.device):
        return scaled_mm(a8, b8.t(), scale_a, scale_b.t(), a.dtype, fast)
    return (a8.float() @ b8.float().t() * scale_a * scale_b.t()).to(a.dtype)  # the same, but slow


def quantize(x: Tensor, kind: torch.dtype, rowwise: bool) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, and scale. x: [m, k]; scale: float32, [m, 1] if `rowwise`, else 0-dim.

    A scale is the smallest power of two that leaves no value out of range; dividing by it rounds nothing. Where x is
    not finite, a product with it is not.
    """
    largest = x.abs().amax(-1, keepdim=True) if rowwise else x.abs().amax()
    factor = torch.finfo(kind).max / largest.float().clamp(min=LEAST_MAXIMUM)
    factor = (factor.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return (x.float() * factor).to(kind), 1 / factor


def _padded(x: Tensor) -> Tensor:
    """Rows that lie one after another in memory, each with zeros up to a multiple of MULTIPLE."""
    return F.pad(x, (0, -x.shape[1] % MULTIPLE)).contiguous()


def has_kernel(device: torch.device) -> bool:
    """Whether the device computes products of 8-bit floats; others emulate them."""
    return device.type == "cuda"


def card_has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device multiplies E4M3 and E5M2. AMD's MI300 has 8-bit types of its own."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
