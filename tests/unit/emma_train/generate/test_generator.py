"""Sampling: text against a naive loop, the flow against closed forms, and requests packed against one by one."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emma_train.generate.generator import Generator, keep_norm, sample_next_token
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.model.emma import Emma, Prediction
from emma_train.objectives.counter_rng import normal
from emma_train.sequence import layout
from emma_train.sequence.layout import TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.request import Request, as_sample
from tests.helpers import CHANNELS, PATCH, SHUFFLE, FakeAutoencoder, make_image, tiny_emma, tokenizer


def generator(model: nn.Module, cached: bool | None = None) -> Generator:
    """The models in closed form look at whole packs, so they are asked without a cache."""
    cached = isinstance(model, Emma) if cached is None else cached
    return Generator(model, FakeAutoencoder(), tokenizer(), PATCH, SHUFFLE, cached)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def emma() -> Emma:
    return tiny_emma().eval()


QUESTIONS = [
    Request("a", "i2t", "What is this?", [make_image(2, 2, 1)], seed=1),
    Request("b", "i2t", "Which colour has the left one of them?", [make_image(1, 2, 2), make_image(2, 2, 3)], seed=2),
    Request("c", "i2t", "Say something.", seed=3),
]
PROMPTS = [
    Request("a", "t2i", "a red fish", size=(64, 64), seed=11),
    Request("b", "t2i", "two dogs under a tree", size=(64, 96), seed=12),
]
EDITS = [
    Request("c", "it2i", "add a hat", [make_image(2, 2, 4)], size=(64, 64), seed=13),
    Request("d", "it2i", "remove the left fish", [make_image(1, 3, 5)], size=(32, 96), seed=14),
]


def noise_of(request: Request) -> Tensor:
    tokens = request.size[0] * request.size[1] // 1024
    return normal(torch.tensor([request.seed]), torch.arange(tokens * CHANNELS)).view(tokens, CHANNELS)


# Text


@torch.no_grad()
def naive_answer(model: Emma, request: Request, num: int) -> list[int]:
    """One whole forward per token, laid out anew as a training sample whose last token is to be predicted."""
    fake, written = FakeAutoencoder(), []
    latents = [latent.numpy() for latent in fake.encode([torch.from_numpy(p) for p in request.images])]
    sample = as_sample(request, tokenizer(), PATCH, SHUFFLE, latents)
    for _ in range(num):
        segments = [*sample.segments, TextSegment(tuple(written)), TextSegment((0,), supervised=True)]
        batch = pack([Sample("x", "i2t", segments, sample.images)])
        scaled = torch.zeros(0, CHANNELS) if batch.latents is None else batch.latents * fake.scale
        token = int(model(batch, scaled, torch.zeros(0)).logits[0].argmax())
        if token in (tokenizer().im_end, tokenizer().endoftext):
            break
        written.append(token)
    return written


@pytest.mark.parametrize("request_", QUESTIONS, ids=lambda r: r.key)
def test_a_greedy_answer_is_that_of_a_naive_loop(emma: Emma, request_: Request) -> None:
    want = naive_answer(emma, request_, 8)
    assert len(want) == 8
    assert generator(emma).generate_text([request_], TextSettings(max_tokens=8)) == [tokenizer().decode(want)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_packed_questions_are_answered_as_if_alone(emma: Emma, temperature: float) -> None:
    settings = TextSettings(max_tokens=6, temperature=temperature)
    together = generator(emma).generate_text(QUESTIONS, settings)
    assert together == [generator(emma).generate_text([r], settings)[0] for r in QUESTIONS]
    assert len(set(together)) == 3


def test_sampled_text_follows_its_seed(emma: Emma) -> None:
    settings = TextSettings(max_tokens=6, temperature=1.0)

    def ask(seed: int) -> str:
        return generator(emma).generate_text([Request("a", "i2t", "What?", seed=seed)], settings)[0]

    assert ask(5) == ask(5) and len({ask(seed) for seed in range(6)}) == 6
    assert [r.seed for r in QUESTIONS] == [1, 2, 3]


def test_sampling_has_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    num = 20_000
    for temperature in (1.0, 0.5):
        picked = torch.tensor(sample_next_token(logits.expand(num, 4), list(range(num)), 3, temperature))
        want = num * torch.softmax(logits / temperature, 0)
        assert float(((torch.bincount(picked, minlength=4) - want) ** 2 / want).sum()) < 11.3  # chi-square, 1 %
    picked_tokens = [sample_next_token(logits[None], [7], position, 1.0)[0] for position in range(40)]
    assert len(set(picked_tokens)) > 1
    assert sample_next_token(logits.expand(3, 4), [1, 2, 3], 0, 0.0) == [0, 0, 0]


class Script(nn.Module):
    """Says the next word of each sample's script; counts its calls."""

    def __init__(self, words: list[list[int]]) -> None:
        super().__init__()
        self.words, self.calls = words, 0

    def forward(self, batch: PackedBatch, latents: Tensor, time: Tensor, cache: None) -> Prediction:
        logits = torch.zeros(len(batch.keys), 1024)
        for row, words in enumerate(self.words):
            logits[row, words[min(self.calls, len(words) - 1)]] = 1.0
        self.calls += 1
        return Prediction(logits, torch.zeros(0, CHANNELS), None)


def test_an_answer_ends_at_its_end_token_and_all_stop_when_the_last_does() -> None:
    ours = tokenizer()
    cat, dogs = ours.encode("cat"), ours.encode("three big dogs")
    script = [[*cat, ours.im_end, *dogs], [*dogs, ours.endoftext]]
    model = Script(script)
    assert generator(model).generate_text(QUESTIONS[:2], TextSettings(max_tokens=50)) == ["cat", "three big dogs"]
    assert model.calls == len(dogs) + 1
    model = Script(script)
    settings = TextSettings(max_tokens=50, fixed_length=True)
    assert generator(model).generate_text(QUESTIONS[:2], settings) == ["cat", "three big dogs"] and model.calls == 50
    assert generator(Script(script)).generate_text(QUESTIONS[:2], TextSettings(max_tokens=1))[1] == ours.decode(
        dogs[:1]
    )


# Images


class Field(nn.Module):
    """A velocity field in closed form; keeps what it was called with."""

    def __init__(self, field: Callable[[PackedBatch, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.field, self.times, self.clean = field, [], []  # type: ignore[var-annotated]

    def forward(self, batch: PackedBatch, latents: Tensor, time: Tensor, cache: None) -> Prediction:
        num = batch.counts[3]
        self.times.append(time.clone())
        self.clean.append(latents[: len(latents) - num].clone())
        velocity = self.field(batch, latents[len(latents) - num :], time[:, None])
        return Prediction(torch.zeros(0, 1024), velocity, None)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (7, 4.0)])
def test_a_field_that_points_at_an_image_arrives_there(steps: int, shift: float) -> None:
    # On the line x_t = (1 - t) x + t noise the exact velocity is (x_t - x) / t, and Euler makes no error.
    goal = torch.linspace(-1, 1, CHANNELS)
    model = Field(lambda batch, x, t: (x - goal) / t)
    made = generator(model).generate_latents(PROMPTS, FlowSettings(steps, 1.0, 1.0, shift))
    for latent, request in zip(made, PROMPTS, strict=True):
        assert latent.shape == (request.size[0] * request.size[1] // 1024, CHANNELS)
        torch.testing.assert_close(latent * 0.5, goal.expand_as(latent), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("steps", "shift"), [(5, 1.0), (3, 4.0)])
def test_euler_steps_of_a_linear_field_are_a_product(steps: int, shift: float) -> None:
    model = Field(lambda batch, x, t: 0.5 * x + t)
    (made,) = generator(model).generate_latents(PROMPTS[:1], FlowSettings(steps, 1.0, 1.0, shift))
    t = np.linspace(1, 0, steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    x = noise_of(PROMPTS[0]).double().numpy()
    for now, then in zip(t, t[1:], strict=False):
        x = x + (then - now) * (0.5 * x + now)
    np.testing.assert_allclose(made.double().numpy() * 0.5, x, rtol=0, atol=2e-6)
    np.testing.assert_allclose([float(time[0]) for time in model.times], t[:-1], atol=1e-7)
    assert all(len(time.unique()) == 1 for time in model.times)


def test_heun_is_of_second_order_and_ends_with_euler() -> None:
    """dx/dt = x from time 1 to 0 divides by e; a step of half the size makes a quarter of the error."""
    noise = noise_of(PROMPTS[0])
    exact, error = noise / math.e, {}
    for steps in (8, 16):
        model = Field(lambda batch, x, t: x)
        (made,) = generator(model).generate_latents(PROMPTS[:1], FlowSettings(steps, 1.0, 1.0, solver="heun"))
        error[steps] = float((made * 0.5 - exact).norm() / exact.norm())
        h = 1 / steps
        torch.testing.assert_close(made * 0.5, noise * (1 - h + h * h / 2) ** (steps - 1) * (1 - h))
        assert len(model.times) == 2 * steps - 1 and float(model.times[-1][0]) == pytest.approx(h)
    assert error[8] / error[16] == pytest.approx(4, rel=0.15)


def conditions(batch: PackedBatch) -> Tensor:
    """(has text, has reference) of every target token: float32 [targets, 2]."""
    empty = len([i for s in layout.generation(tokenizer(), [], "", "t") if isinstance(s, TextSegment) for i in s.ids])
    text = torch.bincount(batch.sample[: batch.counts[0]], minlength=len(batch.keys))
    start = batch.counts[0] + batch.counts[1]
    reference = torch.bincount(batch.sample[start : start + batch.counts[2]], minlength=len(batch.keys)) > 0
    has_text = text - 2 * reference > empty
    owner = batch.sample[len(batch.sample) - batch.counts[3] :]
    return torch.stack([has_text, reference], 1)[owner].float()


V_BOTH, V_IMAGE, V_TEXT, V_NOTHING = 1.0, 10.0, 100.0, 1000.0


def by_condition(batch: PackedBatch, x: Tensor, t: Tensor) -> Tensor:
    text, image = conditions(batch).split(1, dim=1)
    value = text * image * V_BOTH + (1 - text) * image * V_IMAGE + text * (1 - image) * V_TEXT
    return (value + (1 - text) * (1 - image) * V_NOTHING).expand_as(x)


@pytest.mark.parametrize(("text", "image"), [(4.0, 1.5), (1.0, 1.0), (3.0, 3.0), (2.0, 1.0), (1.0, 2.0), (0.0, 1.0)])
def test_editing_is_guided_by_image_then_by_text(text: float, image: float) -> None:
    made = generator(Field(by_condition)).generate_latents(EDITS, FlowSettings(2, text, image))
    velocity = V_NOTHING + image * (V_IMAGE - V_NOTHING) + text * (V_BOTH - V_IMAGE)
    for latent, request in zip(made, EDITS, strict=True):
        torch.testing.assert_close(latent * 0.5, noise_of(request) - velocity, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("text", [4.0, 1.0, 0.0])
def test_generation_is_guided_by_text(text: float) -> None:
    made = generator(Field(by_condition)).generate_latents(PROMPTS, FlowSettings(2, text, 1.5))
    velocity = V_NOTHING + text * (V_TEXT - V_NOTHING)
    for latent, request in zip(made, PROMPTS, strict=True):
        torch.testing.assert_close(latent * 0.5, noise_of(request) - velocity, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("low", "high", "guided"), [(0.0, 1.0, [1, 1]), (0.5, 1.0, [1, 0]), (0.0, 0.6, [0, 1])])
def test_guidance_may_be_limited_to_an_interval_of_flow_time(low: float, high: float, guided: list[int]) -> None:
    settings = FlowSettings(2, 4.0, 1.5, guidance_from=low, guidance_to=high)  # velocities at times 1 and 0.5
    model = Field(by_condition)
    made = generator(model).generate_latents(PROMPTS, settings)
    velocities = [V_NOTHING + 4.0 * (V_TEXT - V_NOTHING) if guides else V_TEXT for guides in guided]
    for latent, request in zip(made, PROMPTS, strict=True):
        torch.testing.assert_close(latent * 0.5, noise_of(request) - sum(velocities) / 2, rtol=1e-5, atol=1e-3)
    tokens = sum(r.size[0] * r.size[1] // 1024 for r in PROMPTS)
    assert [len(times) // tokens for times in model.times] == [1 + guides for guides in guided], "one copy without"


@pytest.mark.parametrize(("text", "velocity"), [(4.0, -V_TEXT), (1.1, 10.0), (1.0, V_TEXT), (0.0, V_TEXT)])
def test_a_guided_velocity_is_no_longer_than_the_conditional_one(text: float, velocity: float) -> None:
    made = generator(Field(by_condition)).generate_latents(PROMPTS, FlowSettings(1, text, 1.0, guidance_renorm=True))
    for latent, request in zip(made, PROMPTS, strict=True):
        torch.testing.assert_close(latent * 0.5, noise_of(request) - velocity, rtol=1e-5, atol=1e-3)


def test_each_image_keeps_its_norm() -> None:
    guided, conditional = torch.randn(5, 4), torch.randn(5, 4)
    kept = keep_norm(guided, conditional, [2, 3])
    for part, before, limit in zip(kept.split([2, 3]), guided.split([2, 3]), conditional.split([2, 3]), strict=True):
        assert part.norm().item() == pytest.approx(min(before.norm().item(), limit.norm().item()), rel=1e-5)
        torch.testing.assert_close(part / part.norm(), before / before.norm())


def test_without_guidance_there_is_one_copy_and_with_it_no_needless_one() -> None:
    def copies(requests: list[Request], text: float, image: float) -> int:
        model = Field(lambda batch, x, t: torch.zeros_like(x))
        generator(model).generate_latents(requests, FlowSettings(1, text, image))
        tokens = sum(r.size[0] * r.size[1] // 1024 for r in requests)
        return len(model.times[0]) // tokens

    assert [copies(PROMPTS, *g) for g in ((1.0, 1.5), (4.0, 1.5))] == [1, 2]
    assert [copies(EDITS, *g) for g in ((1.0, 1.0), (4.0, 1.0), (3.0, 3.0), (4.0, 1.5))] == [1, 2, 2, 3]


def test_references_stay_clean_and_scaled_at_every_step() -> None:
    model = Field(lambda batch, x, t: torch.ones_like(x))
    generator(model).generate_latents(EDITS, FlowSettings(3, 1.0, 1.0))
    want = torch.cat(FakeAutoencoder().encode([torch.from_numpy(r.images[0]) for r in EDITS])) * 0.5
    assert len(model.clean) == 3 and all(torch.equal(clean, want) for clean in model.clean)


@pytest.mark.parametrize("requests", [PROMPTS, EDITS, [PROMPTS[0], EDITS[1]]], ids=["t2i", "it2i", "both"])
def test_packed_requests_are_drawn_as_if_alone(emma: Emma, requests: list[Request]) -> None:
    settings = FlowSettings(steps=3, text_guidance=2.0, image_guidance=1.5)
    together = generator(emma).generate_latents(requests, settings)
    alone = [generator(emma).generate_latents([r], settings)[0] for r in requests]
    scale = max(float(a.abs().max()) for a in alone)
    assert scale > 0.5
    for one, other in zip(together, alone, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, scale)


def test_the_noise_is_that_of_the_requests_seed(emma: Emma) -> None:
    settings = FlowSettings(steps=2, text_guidance=1.0)
    other = Request("a", "t2i", "a red fish", size=(64, 64), seed=99)
    first, again, with_overrides = (
        generator(emma).generate_latents([r], settings)[0] for r in (PROMPTS[0], PROMPTS[0], other)
    )
    assert torch.equal(first, again) and (first - with_overrides).abs().max() > 0.1


def test_images_have_the_size_that_was_asked_for(emma: Emma) -> None:
    made = generator(emma).generate_images(PROMPTS, FlowSettings(steps=1))
    assert [(p.shape, p.dtype) for p in made] == [((64, 64, 3), np.uint8), ((64, 96, 3), np.uint8)]


# What is computed once


class Rows:
    """Counts the tokens that pass through a model's decoder."""

    def __init__(self, model: Emma) -> None:
        self.passes: list[int] = []
        self.hook = model.decoder.register_forward_pre_hook(lambda _, inputs: self.passes.append(len(inputs[0])))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("requests", [PROMPTS, EDITS, [PROMPTS[0], EDITS[1]]], ids=["t2i", "it2i", "both"])
def test_images_are_the_same_from_a_prompt_that_is_computed_once(
    emma: Emma, requests: list[Request], solver: str
) -> None:
    settings = FlowSettings(4, 2.0, 1.5, solver=solver)
    rows = Rows(emma)
    once = generator(emma).generate_latents(requests, settings)
    short, rows.passes = rows.passes, []
    always = generator(emma, cached=False).generate_latents(requests, settings)
    rows.hook.remove()
    for one, other in zip(once, always, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))
    evaluations = 4 if solver == "euler" else 7
    targets = sum(r.size[0] * r.size[1] // 1024 for r in requests)
    branches = 3 if any(r.images for r in requests) else 2
    assert len(rows.passes) == evaluations and short[1:] == [branches * targets] * evaluations
    assert short[0] + short[1] == rows.passes[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_from_a_question_that_is_computed_once(emma: Emma, temperature: float) -> None:
    settings = TextSettings(max_tokens=12, temperature=temperature, fixed_length=True)
    rows = Rows(emma)
    once = generator(emma).generate_text(QUESTIONS, settings)
    short, rows.passes = rows.passes, []
    assert generator(emma, cached=False).generate_text(QUESTIONS, settings) == once
    rows.hook.remove()
    assert short == [rows.passes[0], *[len(QUESTIONS)] * 11]
