"""Adapters: what reaches the LLM width, flow time and 2D positions."""

import torch

from emma_train.model.adapters import Adapter, GenAdapter, position_2d, time_features
from tests.helpers import randomise

SEMANTIC, LATENT, HIDDEN = 24, 8, 32


def gen_adapter() -> GenAdapter:
    model = GenAdapter(SEMANTIC, LATENT, HIDDEN, time_features=16)
    randomise(model)
    return model


def test_the_semantic_half_is_normalised_and_the_latent_half_is_not() -> None:
    model = Adapter(SEMANTIC, LATENT, HIDDEN)
    randomise(model)
    semantic, latent = torch.randn(5, SEMANTIC), torch.randn(5, LATENT)
    normalised = torch.nn.functional.layer_norm(semantic, (SEMANTIC,), model.norm.weight, model.norm.bias, 1e-6)
    want = model.fc2(torch.nn.functional.gelu(model.fc1(torch.cat([normalised, latent], -1))))
    torch.testing.assert_close(model(semantic, latent), want)
    torch.testing.assert_close(model(7 * semantic + 3, latent), want, rtol=1e-4, atol=1e-4)
    assert (model(semantic, 2 * latent) - want).abs().max() > 0.1


def test_references_take_time_0_and_targets_their_own() -> None:
    model, semantic, latent = gen_adapter(), torch.randn(3, SEMANTIC), torch.randn(7, LATENT)
    out = model.forward_images(semantic, latent, torch.tensor([0.0, 0.2, 0.2, 0.9]))
    time_0 = time_features(torch.zeros(1), 16)
    shift_0 = model.time_fc2(torch.nn.functional.silu(model.time_fc1(time_0)))
    torch.testing.assert_close(out[:3], model(semantic, latent[:3]) + shift_0)
    again = model.forward_images(semantic, latent, torch.tensor([0.0, 0.2, 0.7, 0.9]))
    assert ((out != again).any(-1)).tolist() == [False] * 5 + [True, False]


def test_a_target_shows_its_latent_and_the_placeholder_instead_of_a_clean_image() -> None:
    model, latent, time = gen_adapter(), torch.randn(4, LATENT), torch.full((4,), 0.5)
    nothing = torch.zeros(0, SEMANTIC)
    out = model.forward_images(nothing, latent, time)
    assert out.shape == (4, HIDDEN) and len(torch.unique(out, dim=0)) == 4
    same = model.forward_images(nothing, latent[:1].expand(4, -1), time)
    assert len(torch.unique(same, dim=0)) == 1
    with torch.no_grad():
        model.placeholder += 1.0
    assert ((model.forward_images(nothing, latent, time) - out).abs().amax(-1) > 1e-3).all()


def test_the_placeholder_learns_from_targets_alone() -> None:
    model = gen_adapter()
    model.forward_images(torch.randn(3, SEMANTIC), torch.randn(3, LATENT), torch.zeros(0)).sum().backward()
    assert model.placeholder.grad is not None and not model.placeholder.grad.any()
    model.forward_images(torch.zeros(0, SEMANTIC), torch.randn(3, LATENT), torch.rand(3)).sum().backward()
    assert model.placeholder.grad.any()


def test_time_features_are_sines_of_a_thousand_times_t() -> None:
    features = time_features(torch.tensor([0.0, 0.25, 1.0]), 8)
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    angles = torch.tensor([0.0, 250.0, 1000.0])[:, None] * frequencies
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], -1), rtol=0, atol=1e-4)
    assert features[0].tolist() == [1.0] * 4 + [0.0] * 4


def test_2d_positions_are_distinct_bounded_and_the_same_in_every_image() -> None:
    table = position_2d([(32, 32)], 64, torch.device("cpu"))
    assert table.shape == (1024, 64) and table.abs().max() <= 1
    distance = torch.cdist(table.double(), table.double()) + 10 * torch.eye(1024)
    assert distance.min() > 0.1
    parts = position_2d([(2, 3), (32, 32), (4, 1)], 64, torch.device("cpu"))
    grid = table.view(32, 32, 64)
    assert torch.equal(parts, torch.cat([grid[:2, :3].reshape(6, 64), table, grid[:4, :1].reshape(4, 64)]))


def test_2d_positions_of_rows_and_columns_have_their_own_halves() -> None:
    grid = position_2d([(5, 7)], 32, torch.device("cpu")).view(5, 7, 32)
    assert torch.equal(grid[:, 0, :16], grid[:, 6, :16]) and torch.equal(grid[0, :, 16:], grid[4, :, 16:])
    assert position_2d([], 32, torch.device("cpu")).shape == (0, 32)
    assert not position_2d([(2, 2)], 30, torch.device("cpu"))[:, 28:].any()
