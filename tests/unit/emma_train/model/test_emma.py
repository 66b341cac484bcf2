"""The composition: full-size parameter counts, order of outputs, and start values."""

import math

import pytest
import torch

from emma_train.config.schema import ModelConfig, VisionConfig
from emma_train.model.emma import Emma, training_experts
from emma_train.model.initial import cloned_from, initial_value, start_value
from emma_train.sequence.layout import ImageRole
from emma_train.sequence.pack import pack
from tests.helpers import i2t_sample, it2i_sample, mixed_samples, scaled_latents, t2i_sample, tiny_emma, tiny_model


@pytest.fixture(scope="module")
def full_sizes() -> dict[str, int]:
    config = ModelConfig(vision=VisionConfig(stem_expert=True, router=True))
    with torch.device("meta"):
        return {name: p.numel() for name, p in Emma(config).named_parameters()}


def total(sizes: dict[str, int], *prefixes: str, without: str = "\0") -> int:
    return sum(n for name, n in sizes.items() if name.startswith(prefixes) and without not in name)


def test_the_und_branch_is_qwen3_4b(full_sizes: dict[str, int]) -> None:
    layer = 2560 * 128 * (32 + 8 + 8) + 32 * 128 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    qwen = 151936 * 2560 + 36 * layer + 2560
    assert qwen == 4_022_468_096
    assert total(full_sizes, "decoder.", without=".gen.") == qwen
    assert total(full_sizes, "decoder.", without=".und.") == qwen


def test_the_vision_encoder_is_siglip2_so400m_without_its_pooling_head(full_sizes: dict[str, int]) -> None:
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    size = total(full_sizes, "vision.") - total(full_sizes, "vision.stem_layers.", "vision.router.")
    assert size == 27 * layer + 3 * 16 * 16 * 1152 + 1152 + 1024 * 1152 + 2 * 1152
    assert round(layer / 1e6, 2) == 15.24 and round(size / 1e6, 1) == 413.5


def test_the_stem_expert_is_three_layers_and_with_the_router_about_50_million(full_sizes: dict[str, int]) -> None:
    expert, router = total(full_sizes, "vision.stem_layers."), total(full_sizes, "vision.router.")
    assert round(expert / 1e6, 1) == 45.7 and 45e6 < expert + router < 50e6


def test_the_whole_model_is_within_the_papers_range(full_sizes: dict[str, int]) -> None:
    both = total(full_sizes, "decoder.")
    shared = 18 * (2560 * 128 * 40 + 2 * 128)
    embedding = 151936 * 2560
    assert both == 2 * (4_022_468_096 - embedding) - shared + embedding
    stored = sum(full_sizes.values()) - total(full_sizes, "vision.stem_layers.", "vision.router.")
    assert 6.8e9 < both < 7.7e9 and 6.8e9 < stored < 8.0e9
    # 4608 + 32 channels in, two layers.
    assert total(full_sizes, "und_adapter.") == 2 * 4608 + (4640 + 1) * 2560 + (2560 + 1) * 2560


@pytest.mark.parametrize("kind", ["mixed", "text", "generation", "understanding"])
def test_every_pack_keeps_every_parameter_in_the_graph(kind: str) -> None:
    samples = {
        "mixed": mixed_samples(),
        "text": [i2t_sample(grids=[])],
        "generation": [t2i_sample()],
        "understanding": [i2t_sample()],
    }[kind]
    model, batch = tiny_emma(tiny_model(vision={"stem_expert": True})), pack(samples)
    out = model(batch, scaled_latents(batch), torch.rand(batch.counts[3]), training_experts(batch))
    assert out.logits.shape == (len(batch.labels), 1024) and out.velocity.shape == (batch.counts[3], 32)
    (out.logits.sum() + out.velocity.square().sum()).backward()
    absent = [name for name, p in model.named_parameters() if p.grad is None]
    assert absent == []


def test_velocities_stand_in_the_order_of_targets_and_logits_in_that_of_labels() -> None:
    model, samples = tiny_emma().eval(), mixed_samples()
    batch = pack(samples)
    time = torch.linspace(0.1, 0.9, batch.counts[3])
    with torch.no_grad():
        together = model(batch, scaled_latents(batch), time)
        velocity, logits = 0, 0
        for sample in samples:
            alone = pack([sample])
            num = alone.counts[3]
            got = model(alone, scaled_latents(alone), time[velocity : velocity + num])
            torch.testing.assert_close(together.velocity[velocity : velocity + num], got.velocity, rtol=0, atol=1e-5)
            part = together.logits[logits : logits + len(alone.labels)]
            torch.testing.assert_close(part, got.logits, rtol=0, atol=1e-5)
            velocity, logits = velocity + num, logits + len(alone.labels)
    assert (velocity, logits) == (len(together.velocity), len(together.logits))


def test_a_cached_latent_gives_what_an_encoded_one_gives() -> None:
    model, samples = tiny_emma().eval(), mixed_samples()
    cached = pack(samples)
    latents = scaled_latents(cached)
    samples[0].images["img0"].latent = None
    online, time = pack(samples), torch.full((cached.counts[3],), 0.5)
    assert online.latents is None and len(online.patches) > len(cached.patches)
    with torch.no_grad():
        one, other = model(cached, latents, time), model(online, latents, time)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.velocity, other.velocity)


def test_pixels_are_in_minus_one_to_one() -> None:
    model, batch = tiny_emma(), pack(mixed_samples())
    pixels = model.pixels(batch)
    num_seen = 4 * sum(r * c for role in (ImageRole.UND, ImageRole.REFERENCE) for r, c in batch.grids[role])
    assert pixels.shape == (num_seen, 768)
    torch.testing.assert_close((pixels + 1) * 127.5, batch.patches.float(), rtol=0, atol=1e-4)
    assert pixels.min() == -1.0 and pixels.max() == 1.0


def test_routing_alone_gives_the_logits_of_the_whole_forward() -> None:
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True})).eval()
    batch = pack(mixed_samples())
    with torch.no_grad():
        prediction = model(batch, scaled_latents(batch), torch.rand(batch.counts[3]))
        assert torch.equal(model.route(batch), prediction.router_logits)
    assert model.route(batch).shape == (4, 2)


def test_expert_tuning_sends_stem_images_alone_to_the_stem_expert() -> None:
    batch = pack([i2t_sample("a", stem=1), i2t_sample("b", stem=0), i2t_sample("c"), it2i_sample("e")])
    assert batch.stem.tolist() == [1, 0, -1]
    assert training_experts(batch) == [1, 0, 0, 0]


def test_references_of_edits_take_the_versatile_expert_whatever_the_router_says() -> None:
    batch = pack([i2t_sample(), it2i_sample()])
    outputs = {}
    for threshold in (0.0, 1.0):  # the router sends every image, or none, to the STEM expert
        config = tiny_model(vision={"stem_expert": True, "router": True, "stem_threshold": threshold})
        with torch.no_grad():
            outputs[threshold] = tiny_emma(config).eval()(batch, scaled_latents(batch), torch.full((4,), 0.5))
    assert torch.equal(outputs[0.0].velocity, outputs[1.0].velocity)
    assert not torch.equal(outputs[0.0].logits, outputs[1.0].logits)


def test_start_values_are_a_pure_function_of_seed_and_name() -> None:
    shape = torch.Size([64, 128])
    one = initial_value("decoder.layers.0.und.v_proj.weight", shape, 0, 4)
    assert torch.equal(one, initial_value("decoder.layers.0.und.v_proj.weight", shape, 0, 4))
    assert not torch.equal(one, initial_value("decoder.layers.0.und.v_proj.weight", shape, 1, 4))
    assert not torch.equal(one, initial_value("decoder.layers.0.gen.v_proj.weight", shape, 0, 4))


@pytest.mark.parametrize("adapter", ["und_adapter", "gen_adapter"])
def test_latent_columns_may_have_their_own_fan_in(adapter: str) -> None:
    shape, name = torch.Size([2560, 4608 + 32]), f"{adapter}.fc1.weight"
    joint, separate = (start_value(name, shape, ModelConfig(latent_fan_in=f)) for f in ("joint", "separate"))
    assert torch.equal(joint[:, :4608], separate[:, :4608])
    assert joint[:, 4608:].std().item() == pytest.approx(4640**-0.5, rel=0.01)
    assert separate[:, 4608:].std().item() == pytest.approx(32**-0.5, rel=0.01)
    semantic, latent = torch.randn(64, 4608), torch.randn(64, 32)
    sums = [x @ weight.T for x, weight in ((semantic, separate[:, :4608]), (latent, separate[:, 4608:]))]
    assert [x.std().item() for x in sums] == pytest.approx([1.0, 1.0], abs=0.03), "both halves weigh the same"
    other = torch.Size([2560, 2560])
    for unchanged in (f"{adapter}.fc2.weight", "vision.router.fc1.weight"):
        values = [start_value(unchanged, other, ModelConfig(latent_fan_in=f)) for f in ("joint", "separate")]
        assert torch.equal(*values)


def test_start_values_have_the_stated_spread() -> None:
    def std(name: str, *shape: int) -> float:
        return float(initial_value(name, torch.Size(shape), 0, 8).std())

    assert std("decoder.layers.0.und.v_proj.weight", 256, 400) == pytest.approx(1 / 20, rel=0.02)
    assert std("decoder.layers.0.und.o_proj.weight", 256, 400) == pytest.approx(1 / 80, rel=0.02)
    assert std("decoder.layers.0.und.mlp.down_proj.weight", 256, 400) == pytest.approx(1 / 80, rel=0.02)
    assert std("decoder.embed_tokens.weight", 256, 400) == pytest.approx(0.1, rel=0.02)
    assert std("vision.position_embedding.weight", 256, 400) == pytest.approx(0.1, rel=0.02)
    assert std("vision.patch_embedding.weight", 64, 3, 16, 16) == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    for name in ("velocity_head.weight", "velocity_head.bias", "gen_adapter.placeholder", "und_adapter.fc1.bias"):
        assert not initial_value(name, torch.Size([8]), 0, 8).any()
    for name in (
        "decoder.norm.und.weight",
        "vision.layers.0.layer_norm1.weight",
        "decoder.layers.0.shared.q_norm.weight",
    ):
        assert (initial_value(name, torch.Size([8]), 0, 8) == 1).all()


def test_at_the_start_the_velocity_is_zero_and_no_output_is_extreme() -> None:
    config = tiny_model()
    model = Emma(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, 0, 4))
    batch = pack(mixed_samples())
    out = model(batch, scaled_latents(batch), torch.rand(batch.counts[3]))
    assert not out.velocity.any() and out.logits.abs().max() < 5
    loss = torch.nn.functional.cross_entropy(out.logits, batch.labels)
    assert loss.item() == pytest.approx(math.log(1024), abs=0.5)  # logits vary by 0.1 * sqrt(32) around 0


def test_the_stem_expert_is_cloned_layer_by_layer_from_the_last_ones() -> None:
    assert cloned_from("vision.stem_layers.0.fc1.weight", 27, 3) == "vision.layers.24.fc1.weight"
    assert cloned_from("vision.stem_layers.2.q_proj.bias", 27, 3) == "vision.layers.26.q_proj.bias"
    assert (
        cloned_from("vision.layers.2.q_proj.bias", 27, 3) is None
        and cloned_from("vision.router.fc1.weight", 27, 3) is None
    )


def test_pixels_in_bf16_are_the_nearest_to_those_in_float32() -> None:
    batch = pack(mixed_samples())
    exact = tiny_emma().pixels(batch)
    rounded = tiny_emma().bfloat16().pixels(batch)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())
