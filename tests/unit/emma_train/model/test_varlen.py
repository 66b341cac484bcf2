"""Which attention kernel runs where, and that torch.compile keeps it in the graph of a layer."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from emma_train.errors import UserError
from emma_train.model import varlen
from emma_train.model.attention import rotary_tables
from emma_train.model.decoder import DecoderLayer
from emma_train.model.varlen import KERNELS, FlashKernel, choose_kernel, find_kernel, kernel_name
from emma_train.sequence.pack import pack
from tests.helpers import mixed_samples, tiny_model

FLASH_3, FLASH_4, FLASH_2, TORCH = KERNELS
HOPPER, BLACKWELL, AMPERE = 9, 10, 8
CPU = torch.device("cpu")


def installed(*kernels: FlashKernel) -> Callable[[FlashKernel], bool]:
    return lambda kernel: kernel in kernels


@pytest.mark.parametrize(
    ("card", "head_dim", "kernels", "chosen"),
    [
        (HOPPER, 128, KERNELS, FLASH_3),
        (HOPPER, 72, KERNELS, FLASH_3),
        (HOPPER, 128, (FLASH_4, TORCH), FLASH_4),
        # Gradients of flash-attn 4 are wrong on Hopper: for the vision encoder's 72 and other multiples of 8 or 16.
        (HOPPER, 72, (FLASH_4, TORCH), TORCH),
        (HOPPER, 80, (FLASH_4, TORCH), TORCH),
        (HOPPER, 104, (FLASH_4, FLASH_2), FLASH_2),
        (BLACKWELL, 128, KERNELS, FLASH_4),
        (BLACKWELL, 72, KERNELS, FLASH_2),
        (AMPERE, 128, KERNELS, FLASH_2),
        (AMPERE, 72, (TORCH,), TORCH),
        (AMPERE, 36, KERNELS, None),
        (7, 128, KERNELS, None),
    ],
)
def test_the_kernel_is_right_for_the_card_and_the_heads(
    card: int, head_dim: int, kernels: tuple[FlashKernel, ...], chosen: FlashKernel | None
) -> None:
    assert choose_kernel(card, head_dim, installed(*kernels)) == chosen


def test_a_cpu_computes_run_by_run() -> None:
    assert find_kernel(CPU, 128) is find_kernel(CPU, 72)
    assert kernel_name(CPU, 72) == "torch, run by run"


@torch.library.custom_op("emma_test::flash", mutates_args=())
def flash_op(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return q.clone()


@flash_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **lengths: Any) -> tuple[Tensor, None]:
    return flash_op(q, k, v, causal), None


@pytest.fixture
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device passes for a Hopper card; the one kernel that is installed is the fixture's parameter."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    for kernel in KERNELS[:-1]:
        monkeypatch.setitem(sys.modules, kernel.module, module if kernel is request.param else None)
    monkeypatch.setattr(varlen, "_card", lambda device: HOPPER)
    monkeypatch.setattr(varlen, "_ready", list(varlen._ready))
    varlen._load_kernel.cache_clear()
    torch._dynamo.reset()
    yield
    varlen._load_kernel.cache_clear()


@pytest.mark.parametrize("hopper", [FLASH_2], indirect=True)
@pytest.mark.usefixtures("hopper")
def test_heads_without_a_kernel_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="heads of 36 on cards of compute capability 9; use attention.backend=flex"):
        find_kernel(CPU, 36)


@pytest.mark.parametrize("hopper", [FLASH_2, TORCH], indirect=True)
@pytest.mark.usefixtures("hopper")
def test_a_layer_with_a_flash_kernel_is_one_graph() -> None:
    config = tiny_model().decoder
    # On the meta device kernels have shapes, which is all that tracing needs. Both kinds of layer: test_compiled.py.
    layer = DecoderLayer(config, []).to("meta")
    batch = pack(mixed_samples())
    tables = rotary_tables(batch.position.to("meta"), config.head_dim, config.rope_theta, torch.float32)
    x, spans = torch.randn(batch.num_tokens, config.hidden, device="meta"), batch.spans.to(torch.device("meta"))
    explained = torch._dynamo.explain(torch.compile(layer.forward, dynamic=True))(x, batch.num_und, tables, spans)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
