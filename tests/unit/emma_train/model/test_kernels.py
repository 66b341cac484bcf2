"""Kernels and bytes of layers of EMMA-4B, as far as they can be counted without a card (issue 18)."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from emma_train.model.decoder import MLP, RMSNorm
from tests.card import card_on_cpu, card_on_meta, norms_as_on_a_card
from tests.kernels import Kernels, eager_kernels, eight_pairs, fused, graph_breaks


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from card_on_meta(monkeypatch)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from card_on_cpu(monkeypatch, "flash_attn")


@pytest.mark.parametrize(("kind", "most"), [("shallow", 140), ("deep", 165), ("vision", 45)])
@pytest.mark.usefixtures("meta")
def test_an_eager_layer_launches_few_kernels(kind: str, most: int) -> None:
    assert eight_pairs().num_tokens == 6176
    assert most - 15 < eager_kernels(kind) <= most


@pytest.mark.slow
@pytest.mark.usefixtures("cpu")
def test_a_compiled_layer_launches_few_kernels_and_moves_few_bytes() -> None:
    shallow = fused("shallow")
    assert 70 < shallow.nodes <= 90
    assert 2.8e9 < shallow.elementwise_bytes <= 3.2e9


@pytest.mark.usefixtures("cpu")
def test_a_planted_graph_break_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in each of the two branches of a layer, and those of the functions around them."""
    assert graph_breaks("deep") == 0
    plain = MLP.forward

    def broken(self: MLP, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return plain(self, x)

    monkeypatch.setattr(MLP, "forward", broken)
    assert graph_breaks("deep") >= 2


def test_slices_are_counted_with_their_zeros() -> None:
    x = torch.empty(4, 4, device="meta", requires_grad=True)
    with Kernels() as kernels:
        (x[1:] * 2).sum().backward()
    # mul, sum; ones_like, mul, and the zeros and the copy of the slice.
    assert kernels.count == 6


def test_the_norm_of_a_card_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 3, 64).unbind()

    def gradients(norm: nn.Module) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        norm.zero_grad()
        y = norm(inputs)
        y.backward(grad)
        return [y.detach(), inputs.grad, *(p.grad for p in norm.parameters())]  # type: ignore[list-item]

    norm = RMSNorm(64, 1e-6)
    nn.init.normal_(norm.weight)
    plain = gradients(norm)
    norms_as_on_a_card(monkeypatch)
    for one, other in zip(plain, gradients(norm), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
