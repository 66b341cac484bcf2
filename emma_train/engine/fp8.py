"""engine.fp8: which linears multiply in 8-bit floats (docs/engines.md)."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from emma_train.engine.fp8_linear import LEAST_CAPABILITY, MULTIPLE, Fp8Linear, card_has_fp8, has_kernel
from emma_train.errors import UserError
from emma_train.model.emma import Emma

log = logging.getLogger(__name__)


def use_fp8(model: Emma, kind: str, device: torch.device) -> None:
    """Turn the linears of `fp8_linears` into Fp8Linear, in place; parameters keep their names. `kind` is engine.fp8.

    Call it before compiling and sharding. Raises UserError where the card has no 8-bit products.
    """
    if kind == "off":
        return
    check_card(device)
    linears = fp8_linears(model)
    for linear in linears:
        linear.__class__ = Fp8Linear
        linear.rowwise = kind == "rowwise"  # type: ignore[assignment]
    if not linears:
        log.warning("engine.fp8=%s has no effect: it needs three layers, and sizes that %d divides", kind, MULTIPLE)
        return
    emulated = "" if has_kernel(device) else ", emulated, which is slow"
    log.info("engine.fp8=%s: %d linears%s; mfu stays the share of the bf16 peak", kind, len(linears), emulated)


def fp8_linears(model: Emma) -> list[nn.Linear]:
    """The linears of all layers of decoder and vision encoder but the first and the last, where rounding costs most.

    The STEM expert takes the place of the encoder's last layers, so its first layer is an inner one. Linears with a
    size that MULTIPLE does not divide are left out.
    """
    expert: Iterable[nn.Module] = [] if model.vision.stem_layers is None else model.vision.stem_layers[:-1]
    layers = (*model.decoder.layers[1:-1], *model.vision.layers[1:-1], *expert)
    linears = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    return [x for x in linears if x.in_features % MULTIPLE == 0 and x.out_features % MULTIPLE == 0]


def check_card(device: torch.device) -> None:
    """Raise UserError if the device is a card without 8-bit products."""
    if device.type == "cuda" and not card_has_fp8(device):
        raise UserError(
            f"engine.fp8 needs an NVIDIA card of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or newer "
            f"(Ada, Hopper, Blackwell), not {torch.cuda.get_device_name(device)}; set engine.fp8=off"
        )
