"""The vision encoder against transformers' SigLIP, over sizes, packs and experts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from emma_train.config.schema import VisionConfig
from emma_train.model.vision import STEM, VERSATILE, VisionEncoder, resize_matrix
from emma_train.sequence.geometry import to_patches
from tests.helpers import PATCH, SHUFFLE, VISION, block_order, make_image, randomise

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
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.heads,
            image_size=config.position_grid * config.patch,
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


def noise_patches(grids: list[Grid]) -> Tensor:
    return patches_of([make_image(*grid, seed=index) for index, grid in enumerate(grids)])


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (4, 4), (1, 5), (3, 1), (1, 1), (1, 64), (8, 8)])
def test_equals_siglip_at_the_tables_size_and_interpolated_at_others(grid: Grid) -> None:
    model, image = encoder(), make_image(*grid)
    pixel_values = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        got = model(patches_of([image]), [grid]).features
        at_table_size = grid == (2, 2)
        want = siglip(model)(pixel_values, interpolate_pos_encoding=not at_table_size).last_hidden_state[0]
    assert got.shape == (grid[0] * grid[1], SHUFFLE**2 * model.config.hidden)
    raster = want[block_order(*grid)].reshape(got.shape)
    assert want.std() > 0.3 and float((got - raster).abs().max()) <= 1e-5


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_features_are_those_of_siglips_layer_after_its_final_norm(feature_layer: int) -> None:
    complete, image = encoder(), make_image(2, 2)
    model = encoder(feature_layer=feature_layer, stem_expert=True)
    reference, pixel_values = siglip(complete), torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        states = reference(pixel_values, output_hidden_states=True).hidden_states
        want = reference.post_layernorm(states[feature_layer])[0][block_order(2, 2)]
        got = model(patches_of([image]), [(2, 2)], [VERSATILE]).features
    assert float((got - want.reshape(got.shape)).abs().max()) <= 1e-5
    assert len(model.layers) == len(complete.layers) + 1 + feature_layer


def test_layers_are_those_of_siglip_to_the_last_bit_at_the_tables_size() -> None:
    """From the embedding on: a convolution adds up the pixels of a patch in another order than a projection."""
    model, patches, grid = encoder(), patches_of([make_image(2, 2)]), [(2, 2)]
    with torch.no_grad():
        embedded, reference = model._embed(patches, grid), siglip(model)
        want = reference.post_layernorm(reference.encoder(inputs_embeds=embedded[None]).last_hidden_state)[0]
        assert torch.equal(model(patches, grid).features, want.reshape(4, -1))
        projected = patches @ model.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1).T
        table = model.position_embedding.weight[block_order(2, 2)]
        assert float((embedded - model.patch_embedding.bias - projected - table).abs().max()) <= 1e-6


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 3), (1, 5), (12, 10), (17, 24), (1, 64), (64, 64)])
def test_positions_are_the_interpolated_table_and_so_is_their_gradient(grid: Grid) -> None:
    """At 32 x 32, as public checkpoints have it; the table's own size is left as it is, to the last bit."""
    rows, columns = grid[0] * SHUFFLE, grid[1] * SHUFFLE
    for side in (4, 32):
        model = encoder(position_grid=side)
        table, direction = model.position_embedding.weight, torch.randn(rows * columns, VISION["hidden"])
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        want = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)[0].flatten(1).T
        got, want = model._positions(table, *grid), want[block_order(*grid)]
        if (rows, columns) == (side, side):
            assert torch.equal(got, table[block_order(*grid)])
        assert float((got - want).detach().abs().max()) <= 1e-6 * max(1.0, float(table.detach().abs().max()))
        slopes = [torch.autograd.grad(x, table, direction, retain_graph=True)[0] for x in (got, want)]
        assert float((slopes[0] - slopes[1]).abs().max()) <= 1e-5 * float(slopes[1].abs().max())


def test_what_is_kept_of_a_size_outlives_a_step_and_the_weights_do_not() -> None:
    model, grids = encoder(), [(3, 5), (2, 3), (3, 5)]
    resize_matrix.cache_clear()
    with torch.no_grad():
        model(noise_patches(grids), grids)
        made = resize_matrix.cache_info().misses
        assert made == 3  # of 6, 10 and 4 patches
        model.position_embedding.weight.mul_(-1.0).add_(0.3)
        moved = model(noise_patches(grids), grids).features
        assert resize_matrix.cache_info().misses == made
        resize_matrix.cache_clear()
        assert torch.equal(model(noise_patches(grids), grids).features, moved)
        model.position_embedding.weight.sub_(0.3).mul_(-1.0)
        assert float((model(noise_patches(grids), grids).features - moved).abs().max()) > 0.1


def test_block_order_is_that_of_to_patches() -> None:
    rows, columns = 3, 2
    numbers = np.arange(rows * columns * SHUFFLE**2).reshape(rows * SHUFFLE, columns * SHUFFLE)
    image = np.repeat(np.repeat(numbers, PATCH, 0), PATCH, 1)[..., None].repeat(3, -1).astype(np.uint8)
    assert to_patches(image, PATCH, SHUFFLE)[:, 0].tolist() == block_order(rows, columns).tolist()


@pytest.mark.parametrize(
    "grids", [[(2, 2), (1, 3), (2, 2), (3, 2)], [(2, 2)] * 3, [(1, 4), (2, 2)], [(1, 1), (1, 32), (8, 4)]]
)
def test_images_of_one_call_are_as_if_alone(grids: list[Grid]) -> None:
    model = encoder(router=True)
    with torch.no_grad():
        together = model(noise_patches(grids), grids)
        start = 0
        for index, (rows, columns) in enumerate(grids):
            alone = model(patches_of([make_image(rows, columns, seed=index)]), [(rows, columns)])
            part = together.features[start : start + rows * columns]
            torch.testing.assert_close(part, alone.features, rtol=0, atol=1e-5)
            assert together.router_logits is not None and alone.router_logits is not None
            torch.testing.assert_close(together.router_logits[index], alone.router_logits[0], rtol=0, atol=1e-5)
            start += rows * columns


def with_clone(model: VisionEncoder) -> VisionEncoder:
    """The encoder after the hand-off to Stage 4: a STEM expert that is a copy."""
    assert model.stem_layers is not None
    for clone, origin in zip(model.stem_layers, model.layers[-len(model.stem_layers) :], strict=True):
        clone.load_state_dict(origin.state_dict())
    return model


@pytest.mark.parametrize("experts", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]])
def test_a_cloned_expert_changes_nothing_to_the_last_bit(experts: list[int]) -> None:
    grids = [(2, 2)] * 3
    plain, expert = encoder(), with_clone(encoder(stem_expert=True))
    with torch.no_grad():
        before = plain(noise_patches(grids), grids).features
        assert torch.equal(expert(noise_patches(grids), grids, experts).features, before)
        assert torch.equal(expert(noise_patches(grids), grids).features, before)


def test_routing_sends_each_image_through_its_expert_alone() -> None:
    grids = [(2, 2), (1, 3), (2, 2), (2, 3)]
    model = encoder(stem_expert=True)
    with torch.no_grad():
        versatile = model(noise_patches(grids), grids, [VERSATILE] * 4).features
        stem = model(noise_patches(grids), grids, [STEM] * 4).features
        mixed = model(noise_patches(grids), grids, [VERSATILE, STEM, STEM, VERSATILE]).features
    parts = [x.split([4, 3, 4, 6]) for x in (mixed, versatile, stem)]
    for index, expert in enumerate([1, 2, 2, 1]):
        torch.testing.assert_close(parts[0][index], parts[expert][index], rtol=0, atol=1e-5)
        assert float((parts[1][index] - parts[2][index]).abs().max()) > 1e-2


def test_the_router_decides_by_probability_over_the_threshold() -> None:
    logits = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert encoder(stem_expert=True, router=True).choose_experts(logits, 4) == [STEM, VERSATILE, VERSATILE, STEM]
    strict = encoder(stem_expert=True, router=True, stem_threshold=0.9)
    assert strict.choose_experts(logits, 4) == [VERSATILE, VERSATILE, VERSATILE, STEM]
    assert encoder(stem_expert=True).choose_experts(None, 2) == [VERSATILE, VERSATILE]


def test_only_the_images_to_be_routed_may_take_the_stem_expert() -> None:
    logits, model = torch.tensor([[0.0, 9.0]] * 3), encoder(stem_expert=True, router=True)
    assert model.choose_experts(logits, 3) == [STEM, STEM, STEM]
    assert model.choose_experts(logits, 3, num_routed=2) == [STEM, STEM, VERSATILE]
    assert model.choose_experts(logits, 3, num_routed=0) == [VERSATILE] * 3


def test_the_forward_follows_the_router() -> None:
    grids = [(2, 2), (1, 3), (2, 2), (2, 3)]
    model = encoder(stem_expert=True, router=True)
    with torch.no_grad():
        logits = model(noise_patches(grids), grids).router_logits
        assert logits is not None
        model.router.fc2.bias[STEM] += logits[:, VERSATILE].sub(logits[:, STEM]).median() + 1e-3
        free = model(noise_patches(grids), grids)
        chosen = model.choose_experts(free.router_logits, 4)
        assert set(chosen) == {VERSATILE, STEM}
        assert torch.equal(free.features, model(noise_patches(grids), grids, chosen).features)
        route_only = model(noise_patches(grids), grids, route_only=True)
        assert torch.equal(route_only.router_logits, free.router_logits) and not len(route_only.features)


@pytest.mark.parametrize("experts", [False, True])
def test_a_pack_without_images_keeps_every_parameter_in_the_graph(experts: bool) -> None:
    model = encoder(stem_expert=experts, router=experts)
    output = model(torch.zeros(0, PATCH * PATCH * 3), [])
    assert output.features.shape == (0, SHUFFLE**2 * model.config.hidden)
    loss = output.features.sum() + (output.router_logits.sum() if output.router_logits is not None else 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_an_expert_without_images_has_zero_gradients() -> None:
    grids = [(2, 2), (1, 3)]
    model = encoder(stem_expert=True)
    model(noise_patches(grids), grids, [VERSATILE, VERSATILE]).features.square().sum().backward()
    assert model.stem_layers is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.stem_layers.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.layers[-1].parameters() if p.ndim > 1)
