"""The vision encoder against transformers' SigLIP, over sizes, packs and experts."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from emma_train.config.schema import VisionConfig
from emma_train.model.vision import STEM, VERSATILE, VisionEncoder, block_order
from emma_train.sequence.geometry import to_patches
from tests.helpers import PATCH, SHUFFLE, VISION, picture, randomise

Grid = tuple[int, int]


def encoder(seed: int = 0, **changes: object) -> VisionEncoder:
    model = VisionEncoder(VisionConfig(**{**VISION, **changes}))  # type: ignore[arg-type]
    randomise(model, seed)
    return model.eval()


def siglip(model: VisionEncoder) -> SiglipVisionModel:
    config = model.config
    reference = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.table * config.patch,
            patch_size=config.patch,
            layer_norm_eps=config.eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
    ).eval()
    state = {}
    for name in reference.state_dict():
        ours = name.removeprefix("vision_model.").removeprefix("encoder.").removeprefix("embeddings.")
        ours = ours.replace("self_attn.", "").replace("mlp.", "")
        state[name] = model.get_parameter(ours).detach().clone()
    reference.load_state_dict(state)
    return reference


def patches_of(images: list[np.ndarray]) -> Tensor:
    patches = np.concatenate([to_patches(image, PATCH, SHUFFLE) for image in images])
    return torch.from_numpy(patches).float() / 127.5 - 1.0


def pictures(grids: list[Grid]) -> Tensor:
    return patches_of([picture(*grid, seed=index) for index, grid in enumerate(grids)])


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (4, 4), (1, 5), (3, 1)])
def test_equals_siglip_at_the_tables_size_and_interpolated_at_others(grid: Grid) -> None:
    model, image = encoder(), picture(*grid)
    pixel_values = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        got = model(patches_of([image]), [grid]).features
        at_table_size = grid == (2, 2)
        want = siglip(model)(pixel_values, interpolate_pos_encoding=not at_table_size).last_hidden_state[0]
    assert got.shape == (grid[0] * grid[1], SHUFFLE**2 * model.config.hidden)
    raster = want[block_order(*grid, SHUFFLE)].reshape(got.shape)
    assert want.std() > 0.3 and float((got - raster).abs().max()) <= 1e-5


def test_block_order_is_that_of_to_patches() -> None:
    rows, columns = 3, 2
    numbers = np.arange(rows * columns * SHUFFLE**2).reshape(rows * SHUFFLE, columns * SHUFFLE)
    image = np.repeat(np.repeat(numbers, PATCH, 0), PATCH, 1)[..., None].repeat(3, -1).astype(np.uint8)
    assert to_patches(image, PATCH, SHUFFLE)[:, 0].tolist() == block_order(rows, columns, SHUFFLE).tolist()


@pytest.mark.parametrize("grids", [[(2, 2), (1, 3), (2, 2), (3, 2)], [(2, 2)] * 3, [(1, 4), (2, 2)]])
def test_pictures_of_one_call_are_as_if_alone(grids: list[Grid]) -> None:
    model = encoder(router=True)
    with torch.no_grad():
        together = model(pictures(grids), grids)
        start = 0
        for index, (rows, columns) in enumerate(grids):
            alone = model(patches_of([picture(rows, columns, seed=index)]), [(rows, columns)])
            part = together.features[start : start + rows * columns]
            torch.testing.assert_close(part, alone.features, rtol=0, atol=1e-5)
            assert together.router_logits is not None and alone.router_logits is not None
            torch.testing.assert_close(together.router_logits[index], alone.router_logits[0], rtol=0, atol=1e-5)
            start += rows * columns


def with_clone(model: VisionEncoder) -> VisionEncoder:
    """The encoder after the hand-off to Stage 4: a STEM expert that is a copy."""
    assert model.stem_layers is not None
    for own, origin in zip(model.stem_layers, model.layers[-len(model.stem_layers) :], strict=True):
        own.load_state_dict(origin.state_dict())
    return model


@pytest.mark.parametrize("experts", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]])
def test_a_cloned_expert_changes_nothing_to_the_last_bit(experts: list[int]) -> None:
    grids = [(2, 2)] * 3
    plain, expert = encoder(), with_clone(encoder(stem_expert=True))
    with torch.no_grad():
        before = plain(pictures(grids), grids).features
        assert torch.equal(expert(pictures(grids), grids, experts).features, before)
        assert torch.equal(expert(pictures(grids), grids).features, before)


def test_routing_sends_each_picture_through_its_expert_alone() -> None:
    grids = [(2, 2), (1, 3), (2, 2), (2, 3)]
    model = encoder(stem_expert=True)
    with torch.no_grad():
        versatile = model(pictures(grids), grids, [VERSATILE] * 4).features
        stem = model(pictures(grids), grids, [STEM] * 4).features
        mixed = model(pictures(grids), grids, [VERSATILE, STEM, STEM, VERSATILE]).features
    parts = [x.split([4, 3, 4, 6]) for x in (mixed, versatile, stem)]
    for index, expert in enumerate([1, 2, 2, 1]):
        torch.testing.assert_close(parts[0][index], parts[expert][index], rtol=0, atol=1e-5)
        assert float((parts[1][index] - parts[2][index]).abs().max()) > 1e-2


def test_the_router_decides_by_probability_over_the_threshold() -> None:
    logits = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert encoder(stem_expert=True, router=True).choose(logits, 4) == [STEM, VERSATILE, VERSATILE, STEM]
    strict = encoder(stem_expert=True, router=True, stem_threshold=0.9)
    assert strict.choose(logits, 4) == [VERSATILE, VERSATILE, VERSATILE, STEM]
    assert encoder(stem_expert=True).choose(None, 2) == [VERSATILE, VERSATILE]


def test_the_forward_follows_the_router() -> None:
    grids = [(2, 2), (1, 3), (2, 2), (2, 3)]
    model = encoder(stem_expert=True, router=True)
    with torch.no_grad():
        logits = model(pictures(grids), grids).router_logits
        assert logits is not None
        model.router.fc2.bias[STEM] += logits[:, VERSATILE].sub(logits[:, STEM]).median() + 1e-3
        free = model(pictures(grids), grids)
        chosen = model.choose(free.router_logits, 4)
        assert set(chosen) == {VERSATILE, STEM}
        assert torch.equal(free.features, model(pictures(grids), grids, chosen).features)
        route_only = model(pictures(grids), grids, route_only=True)
        assert torch.equal(route_only.router_logits, free.router_logits) and not len(route_only.features)


@pytest.mark.parametrize("experts", [False, True])
def test_a_pack_without_pictures_keeps_every_parameter_in_the_graph(experts: bool) -> None:
    model = encoder(stem_expert=experts, router=experts)
    output = model(torch.zeros(0, PATCH * PATCH * 3), [])
    assert output.features.shape == (0, SHUFFLE**2 * model.config.hidden)
    loss = output.features.sum() + (output.router_logits.sum() if output.router_logits is not None else 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_an_expert_without_pictures_has_zero_gradients() -> None:
    grids = [(2, 2), (1, 3)]
    model = encoder(stem_expert=True)
    model(pictures(grids), grids, [VERSATILE, VERSATILE]).features.square().sum().backward()
    assert model.stem_layers is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.stem_layers.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.layers[-1].parameters() if p.ndim > 1)
