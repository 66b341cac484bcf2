"""The model's switches, by which EMMA is compared with other ways: each against its closed form, in training and in
generation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emma_train.config.schema import ModelConfig
from emma_train.flops.work import module_flops, pack_work
from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.model.attention import hybrid_mask
from emma_train.model.cache import KVCache
from emma_train.model.emma import Emma, Prediction
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.pack import PackedBatch, Sample, continued, pack
from emma_train.sequence.request import Request
from emma_train.stages.stage import ALL_BUT_AUTOENCODER
from tests.helpers import (
    PATCH,
    SHUFFLE,
    FakeAutoencoder,
    i2t_sample,
    it2i_sample,
    make_image,
    mixed_samples,
    randomise,
    scaled_latents,
    tiny_emma,
    tiny_model,
    tokenizer,
)

SWITCHES = [
    {"adapters": "one"},
    {"placeholder": "zeros"},
    {"und_attention": "full"},
    {"image_positions": "one"},
    {"fusion": "token"},
    {"fusion": "latent"},
    {"fusion": "semantic"},
    {"fusion": "token", "und_attention": "full", "image_positions": "one"},
    {"fusion": "latent", "adapters": "one", "placeholder": "zeros", "und_attention": "full", "image_positions": "one"},
]
"""Each switch at the values that are not EMMA's, and many of them together."""
NOT_OF_TEXT, NOT_OF_IMAGES = ("adapters", "placeholder"), ("und_attention",)
"""Those that leave alone what the model makes of understanding images, and of images to be made."""


def switched(**values: str) -> ModelConfig:
    return replace(tiny_model(), **values)


def packed(config: ModelConfig, samples: list[Sample] | None = None) -> PackedBatch:
    return pack([replace(s, rules=image_rules(config)) for s in samples or mixed_samples()])


def predict(model: Emma, batch: PackedBatch, cache: KVCache | None = None) -> Prediction:
    return model(batch, scaled_latents(batch), torch.linspace(0.1, 0.9, batch.counts[3]), cache=cache)


def names(config: ModelConfig) -> set[str]:
    return set(Emma(config).state_dict())


def test_the_defaults_are_emma() -> None:
    """The model of the paper has these parameters beside those of its encoder and decoder, and these tables."""
    adapter = {f"{part}.{kind}" for part in ("norm", "fc1", "fc2") for kind in ("weight", "bias")}
    time = {f"{part}.{kind}" for part in ("time_fc1", "time_fc2") for kind in ("weight", "bias")}
    want = {f"und_adapter.{name}" for name in adapter} | {f"gen_adapter.{name}" for name in adapter | time}
    others = {name for name in names(tiny_model()) if not name.startswith(("decoder.", "vision.", "velocity_head."))}
    assert others == want | {"gen_adapter.placeholder"}
    batch = packed(tiny_model())
    text_and_und = batch.num_und
    assert batch.rotary_position is None
    assert torch.equal(batch.limit[:text_and_und], batch.position[:text_and_und])


@pytest.mark.parametrize("values", SWITCHES, ids=str)
def test_a_switch_changes_what_the_model_gives(values: dict[str, str]) -> None:
    config = switched(**values)
    emma, other = predict(tiny_emma(), packed(tiny_model())), predict(tiny_emma(config), packed(config))
    assert emma.logits is not None and other.logits is not None
    for got, want, others in (
        (other.logits, emma.logits, NOT_OF_TEXT),
        (other.velocity, emma.velocity, NOT_OF_IMAGES),
    ):
        change = float((got - want).detach().abs().max())
        assert change == 0.0 if all(name in others for name in values) else change > 1e-3


# Placeholder


def test_zeros_are_a_placeholder_that_stays_zero() -> None:
    learned, zeros = tiny_emma(), tiny_emma(switched(placeholder="zeros"))
    assert names(tiny_model()) - names(switched(placeholder="zeros")) == {"gen_adapter.placeholder"}
    batch = packed(tiny_model())
    assert learned.gen_adapter.placeholder is not None
    with torch.no_grad():
        learned.gen_adapter.placeholder.zero_()
    assert torch.equal(predict(zeros, batch).velocity, predict(learned, batch).velocity)


# Fusion


def test_semantic_images_have_no_latents_and_latent_ones_no_features() -> None:
    batch = packed(tiny_model())
    num_given = batch.counts[1] + batch.counts[2]
    assert batch.latents is not None
    other_latents = replace(batch, latents=torch.cat([batch.latents[:num_given] + 1, batch.latents[num_given:]]))
    other_pixels = replace(batch, patches=255 - batch.patches)
    other_target = replace(batch, latents=torch.cat([batch.latents[:num_given], batch.latents[num_given:] + 1]))
    for fusion, latents_matter, pixels_matter in (
        ("channel", True, True),
        ("latent", True, False),
        ("semantic", False, True),
        ("token", True, True),
    ):
        model, rules = tiny_emma(switched(fusion=fusion)), image_rules(switched(fusion=fusion))
        if rules.separate:
            batch = packed(switched(fusion=fusion))
            other_latents, other_pixels, other_target = (
                replace(batch, latents=changed.latents, patches=changed.patches)
                for changed in (other_latents, other_pixels, other_target)
            )
        want = predict(model, batch)
        for changed, matters in ((other_latents, latents_matter), (other_pixels, pixels_matter)):
            got = predict(model, changed)
            assert torch.equal(got.velocity, want.velocity) != matters, fusion
            assert torch.equal(got.logits, want.logits) != matters, fusion
        assert not torch.equal(predict(model, other_target).velocity, want.velocity), fusion


def test_zeros_stand_for_the_half_that_an_image_has_not() -> None:
    """The semantic half is zero after its norm, the latent half before the matrices: EMMA with such inputs is equal."""
    emma, semantic = tiny_emma(), tiny_emma(switched(fusion="semantic"))
    batch = packed(tiny_model())
    num_given = batch.counts[1] + batch.counts[2]
    assert batch.latents is not None and names(tiny_model()) == names(switched(fusion="semantic"))
    zeroed = replace(batch, latents=torch.cat([0 * batch.latents[:num_given], batch.latents[num_given:]]))
    assert torch.equal(predict(emma, zeroed).velocity, predict(semantic, batch).velocity)
    latent = tiny_emma(switched(fusion="latent"))
    with torch.no_grad():
        for adapter in (emma.und_adapter, emma.gen_adapter):
            adapter.norm.weight.zero_()
            adapter.norm.bias.zero_()
    torch.testing.assert_close(predict(emma, batch).velocity, predict(latent, batch).velocity)
    torch.testing.assert_close(predict(emma, batch).logits, predict(latent, batch).logits)


def test_without_features_the_encoder_runs_on_no_image_and_learns_nothing() -> None:
    config = switched(fusion="latent")
    model, batch = tiny_emma(config), packed(config)
    out = predict(model, batch)
    (out.velocity.square().sum() + out.logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # in the graph, so that all ranks exchange it
        if name.startswith("vision.") or "adapter.norm" in name:
            assert not parameter.grad.any(), name
    work = pack_work(batch, SHUFFLE)
    assert module_flops(config, ALL_BUT_AUTOENCODER, work)["vision encoder"] == 0
    assert module_flops(tiny_model(), ALL_BUT_AUTOENCODER, work)["vision encoder"] > 0


def test_an_image_has_a_semantic_and_a_latent_token_of_each_cell() -> None:
    config = switched(fusion="token")
    und, edit = i2t_sample("q", [(2, 2), (1, 3)]), it2i_sample("e", (2, 3), (2, 2))
    one, two = packed(tiny_model(), [und, edit]), packed(config, [und, edit])
    assert (one.counts, two.counts) == ((one.counts[0], 7, 6, 4), (one.counts[0], 14, 12, 4))
    assert torch.equal(one.text_ids, two.text_ids) and two.num_cells == (7, 6, 4)
    assert two.num_tokens == sum(replace(s, rules=image_rules(config)).num_tokens for s in (und, edit))
    # Each sample's positions are consecutive, and an image's latent tokens follow its semantic ones.
    for number in (0, 1):
        at = two.position[two.sample == number].sort().values
        assert torch.equal(at, torch.arange(len(at)))
    first = slice(two.counts[0], two.counts[0] + 4)
    latent = slice(two.counts[0] + 7, two.counts[0] + 11)
    assert torch.equal(two.position[latent], two.position[first] + 4)
    # A reference is full within both of its runs, an understanding image causal over both.
    reference = slice(two.num_und, two.num_und + 12)
    assert len(set(two.limit[reference].tolist())) == 1
    assert torch.equal(two.limit[first], two.position[first]) and torch.equal(two.limit[latent], two.position[latent])


@torch.no_grad()
def test_tokens_of_each_kind_are_what_one_encoder_alone_gives() -> None:
    model = tiny_emma(switched(fusion="token"))
    streams: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    samples = [i2t_sample("q", [(2, 2), (1, 3)]), it2i_sample("e", (2, 3), (2, 2))]
    for fusion in ("token", "semantic", "latent"):
        model.config = switched(fusion=fusion)
        predict(model, packed(model.config, samples))
    both, semantic, latent = streams
    num_text, cells = packed(tiny_model(), samples).counts[0], (7, 6, 4)
    text, *runs = both.split([num_text, *(n for n in cells[:2] for _ in range(2)), 4])
    for alone, kinds in ((semantic, runs[0::2]), (latent, runs[1:4:2])):
        parts = alone.split([num_text, *cells])
        for got, want in zip([text, *kinds[:2], runs[-1]], parts, strict=True):
            torch.testing.assert_close(got, want)


# Adapters


def test_one_adapter_is_two_with_equal_matrices() -> None:
    one, two = tiny_emma(switched(adapters="one")), tiny_emma()
    of_gen = {f"gen_adapter.{part}.{kind}" for part in ("norm", "fc1", "fc2") for kind in ("weight", "bias")}
    assert names(tiny_model()) - names(switched(adapters="one")) == of_gen
    two.load_state_dict({**one.state_dict(), **{n: one.state_dict()[n.replace("gen", "und", 1)] for n in of_gen}})
    batch = packed(tiny_model())
    got, want = predict(one, batch), predict(two, batch)
    assert torch.equal(got.velocity, want.velocity) and torch.equal(got.logits, want.logits)
    for out in (got, want):
        (out.velocity.square().sum() + out.logits.square().sum()).backward()
    weight, (und, gen) = one.und_adapter.fc1.weight, (two.und_adapter.fc1.weight, two.gen_adapter.fc1.weight)
    torch.testing.assert_close(weight.grad, und.grad + gen.grad)


def test_one_adapter_trains_with_the_group_of_the_und_adapter() -> None:
    work = pack_work(packed(tiny_model()), SHUFFLE)
    one, two = (
        {groups: module_flops(config, groups, work)["adapters"] for groups in ((), ("und_adapter",), ("gen_adapter",))}
        for config in (switched(adapters="one"), tiny_model())
    )
    assert one[()] == two[()] and one[("gen_adapter",)] == one[()]
    assert one[("und_adapter",)] - one[()] == sum(two[(name,)] - two[()] for name in ("und_adapter", "gen_adapter"))


# Attention among the tokens of an image to be understood


def test_a_token_of_an_understanding_image_sees_all_of_it_or_what_is_before_it() -> None:
    samples = [i2t_sample("q", [(2, 2), (1, 3)]), it2i_sample("e", (2, 3), (2, 2)), i2t_sample("r", [(2, 2)])]
    causal, full = packed(tiny_model(), samples), packed(switched(und_attention="full"), samples)
    more = hybrid_mask(full) & ~hybrid_mask(causal)
    assert not (hybrid_mask(causal) & ~hybrid_mask(full)).any()
    # What is new is the upper triangle of each image: 4 * 3 / 2, 3 * 2 / 2 and 4 * 3 / 2 pairs of Und tokens.
    und = slice(full.counts[0], full.counts[0] + full.counts[1])
    assert int(more.sum()) == int(more[und, und].sum()) == 6 + 3 + 6
    work, wider = pack_work(causal, SHUFFLE), pack_work(full, SHUFFLE)
    assert wider.und_pairs - work.und_pairs == 15 and wider == replace(work, und_pairs=wider.und_pairs)


# Rotary positions


def test_an_image_has_one_rotary_position() -> None:
    config = switched(image_positions="one")
    sample = Sample("x", "it2i", it2i_sample().segments, it2i_sample("e", (2, 3), (2, 2)).images)
    batch = packed(config, [sample, i2t_sample("q", [(2, 2)])])
    assert batch.rotary_position is not None
    assert torch.equal(batch.position, packed(tiny_model(), [sample, i2t_sample("q", [(2, 2)])]).position)
    for number, tokens in ((0, len(sample.segments)), (1, 0)):
        of_sample = batch.sample == number
        order = batch.position[of_sample].argsort()
        got, group = batch.rotary_position[of_sample][order], torch.arange(len(batch.sample))[of_sample][order]
        # A step of one from token to token, and none within an image.
        inside = (group[1:] >= batch.counts[0]) & (group[:-1] >= batch.counts[0])
        assert torch.equal(got[1:] - got[:-1], (~inside).long()) and got[0] == 0
        assert tokens == 0 or int(got[-1]) + 1 == replace(sample, rules=image_rules(config)).num_positions
    assert replace(sample, rules=image_rules(config)).num_positions == sample.num_tokens - 5 - 3


# Generation


REQUESTS = [
    Request("e", "it2i", "add a hat", [make_image(2, 2, 4)], size=(64, 64), seed=13),
    Request("d", "it2i", "remove the left fish", [make_image(1, 3, 5)], size=(32, 96), seed=14),
]
QUESTIONS = [
    Request("b", "i2t", "Which colour has the left one of them?", [make_image(1, 2, 2), make_image(2, 2, 3)], seed=2),
    Request("a", "i2t", "What is this?", [make_image(2, 2, 1)], seed=1),
]


def generator(config: ModelConfig, cached: bool) -> Generator:
    model = Emma(config)
    randomise(model, scale=1.0)
    fake = FakeAutoencoder()
    return Generator(model.eval(), fake, tokenizer(), PATCH, SHUFFLE, cached, image_rules(config))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", SWITCHES, ids=str)
@torch.no_grad()
def test_generation_sees_what_training_saw(values: dict[str, str]) -> None:
    """A prefix and its continuation give what the training forward gives over all of it."""
    config = switched(**values)
    with_cache, without = generator(config, cached=True), generator(config, cached=False)
    settings = FlowSettings(steps=2)
    for one, other in zip(*(g.generate_latents(REQUESTS, settings) for g in (with_cache, without)), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    text = TextSettings(max_tokens=6)
    assert with_cache.generate_text(QUESTIONS, text) == without.generate_text(QUESTIONS, text)
    # The reference is the forward of training, with the sample as the loader makes it.
    asked = [without.sample_of(r, latents) for r, latents in zip(QUESTIONS, without.latents_of(QUESTIONS), strict=True)]
    assert all(sample.rules == image_rules(config) for sample in asked)
    want = last_logits(with_cache.model, packed(config, asked))
    cache = KVCache(len(asked), max(sample.num_tokens for sample in asked))
    heads = [replace(s, segments=s.segments[:-1]) for s in asked]
    tails = [replace(s, segments=s.segments[-1:]) for s in asked]
    predict(with_cache.model, pack(heads), cache)  # type: ignore[arg-type]
    got = last_logits(with_cache.model, continued(pack(tails), heads), cache)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def last_logits(model: object, batch: PackedBatch, cache: KVCache | None = None) -> Tensor:
    """Logits after the last text token of each sample."""
    assert isinstance(model, Emma)
    owners = batch.sample[: batch.counts[0]]
    batch.predictors = torch.searchsorted(owners, torch.arange(len(batch.keys)), right=True) - 1
    logits = predict(model, batch, cache).logits
    assert logits is not None
    return logits
