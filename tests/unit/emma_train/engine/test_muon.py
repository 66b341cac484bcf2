"""Muon: which parameters take it, Newton-Schulz against torch's, the size of an update, owners of matrices."""

import pytest
import torch

from emma_train.config.schema import MuonConfig, OptimizerConfig
from emma_train.engine.muon import assign_owners, newton_schulz, optimizer_lines, takes_muon, update_scale
from emma_train.model.parameter_groups import group_of
from tests.helpers import tiny_emma, tiny_model

ADAMW_MATRICES = {
    "decoder.embed_tokens.weight",
    "velocity_head.weight",
    "vision.patch_embedding.weight",
    "vision.position_embedding.weight",
    "vision.router.fc1.weight",
    "vision.router.fc2.weight",
}
SHAPES = [(16, 16), (24, 40), (40, 24), (1, 8), (33, 7)]


def shapes_of_emma() -> dict[str, torch.Size]:
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}, decoder={"tied": False}))
    return {name: p.shape for name, p in model.named_parameters()}


def test_hidden_matrices_take_muon_and_all_else_adamw() -> None:
    shapes = shapes_of_emma()
    muon = {name for name, shape in shapes.items() if takes_muon(name, shape)}
    matrices = {name for name, shape in shapes.items() if len(shape) > 1}
    assert matrices - muon == ADAMW_MATRICES | {"decoder.lm_head.weight"}
    assert {group_of(name) for name in muon} == {"vision", "stem_expert", "und_adapter", "gen_adapter", "decoder"}
    assert all(len(shapes[name]) == 2 for name in muon)


def test_the_split_is_printed_with_every_parameter_counted_once() -> None:
    shapes = shapes_of_emma()
    muon, adamw = optimizer_lines(OptimizerConfig(lr=1.0, kind="muon"), shapes)
    assert muon.startswith("Muon: ") and adamw.startswith("AdamW: ")
    counts = [int(line.split()[1].replace(",", "")) for line in (muon, adamw)]
    assert sum(counts) == sum(shape.numel() for shape in shapes.values())
    assert "decoder.layers.*.und.v_proj x 4" in muon and "decoder.embed_tokens" in adamw and "x 1" not in muon
    assert optimizer_lines(OptimizerConfig(lr=1.0), shapes) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_an_update_is_that_of_torch(shape: tuple[int, int]) -> None:
    """torch.optim.Muon with the scale of AdamW's root mean square, bit for bit."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    config, gradient = MuonConfig(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = gradient.clone()
    torch.optim.Muon([parameter], 0.1, 0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
    update = torch.zeros(shape).add_(
        newton_schulz(gradient.bfloat16(), config), alpha=-0.1 * update_scale(shape, config)
    )
    assert torch.equal(parameter.detach(), update)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = newton_schulz(matrix, MuonConfig(iterations=8))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    # The iteration is a polynomial in the matrix: it changes the singular values alone.
    mixed = u.T @ result @ v.T
    torch.testing.assert_close(mixed, torch.diag(mixed.diagonal()), rtol=0, atol=1e-9)


def test_zeros_stay_zeros() -> None:
    assert newton_schulz(torch.zeros(3, 5), MuonConfig()).abs().max() == 0


def test_an_update_has_the_root_mean_square_of_adamws() -> None:
    config = MuonConfig()
    for shape in ((64, 64), (64, 256), (256, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        update = update_scale(shape, config) * newton_schulz(matrix, config)
        assert float(update.square().mean().sqrt()) == pytest.approx(config.update_rms, rel=0.2)


def test_owners_are_even_by_cost() -> None:
    costs = [9, 1, 1, 7, 3, 3, 8, 2, 2, 6, 5, 1]
    for ranks in (1, 2, 3, 4):
        owners = assign_owners(costs, ranks)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)]
        assert max(loads) - min(loads) <= 1, (ranks, loads)
    assert sorted(assign_owners([5, 5], 4)) == [0, 1]
    assert assign_owners([], 2) == []
