"""What evaluation harnesses need of the generator: stop strings, likelihoods, several turns, batches by length."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_train.config.schema import AutoencoderConfig, FlowConfig, LossConfig
from emma_train.generate.generator import Generator
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.generate.text_batches import answer_likelihoods, batches_by_length, generate_texts
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import Emma
from emma_train.objectives.loss import LossAccumulator, count, losses
from emma_train.sequence.pack import pack
from emma_train.sequence.request import Request, as_sample, conversation_request
from emma_train.stages.stage import STAGES
from emma_train.training.forward import micro_loss
from tests.helpers import ASSETS, PATCH, SHUFFLE, FakeAutoencoder, make_image, tiny_emma, tokenizer

QUESTIONS = [
    conversation_request("a", [("user", [make_image(2, 2, 1), "What is this?"])]),
    conversation_request("b", [("system", ["Be brief."]), ("user", ["Say something."])]),
    conversation_request(
        "c",
        [
            ("user", ["Left: ", make_image(1, 2, 2), " right: ", make_image(2, 3, 3), " Same?"]),
            ("assistant", ["no"]),
            ("user", ["Why?", make_image(1, 1, 4)]),
        ],
    ),
    conversation_request("d", [("user", ["Which colour has the left one of them, and which the right one?"])]),
]
ANSWERS = ["a cat", "two red apples", "", "green"]


@pytest.fixture(scope="module")
def emma() -> Emma:
    return tiny_emma().eval()


def generator(model: Emma) -> Generator:
    return Generator(model, FakeAutoencoder(), tokenizer(), PATCH, SHUFFLE)  # type: ignore[arg-type]


def training_loss(model: Emma, request: Request, answer: str) -> float:
    """The logged loss/i2t of an optimizer step that consists of this one sample."""
    fake = FakeAutoencoder()
    latents = [latent.numpy() for latent in fake.encode([torch.from_numpy(p) for p in request.images])]
    batch = pack([as_sample(request, tokenizer(), PATCH, SHUFFLE, latents, answer=answer)])
    counts = count([batch], "tokens")
    accumulator = LossAccumulator(LossConfig(), counts, torch.device("cpu"))
    with torch.no_grad():
        micro_loss(model, fake, batch, FlowConfig(), STAGES["stage1"], accumulator)  # type: ignore[arg-type]
    return losses(accumulator.sums.tolist(), counts, LossConfig())["loss/i2t"]


def test_the_likelihood_of_an_answer_is_the_training_loss_of_its_sample(emma: Emma) -> None:
    one_turn = [0, 1, 3]
    asked, answers = [QUESTIONS[i] for i in one_turn], [ANSWERS[i] for i in one_turn]
    for request, answer, likelihood in zip(
        asked, answers, generator(emma).answer_likelihoods(asked, answers), strict=True
    ):
        assert len(likelihood.tokens) == len(tokenizer().encode_user(answer)) + 1
        assert -np.mean(likelihood.tokens) == pytest.approx(training_loss(emma, request, answer), abs=1e-5)
        assert likelihood.text == pytest.approx(sum(likelihood.tokens[:-1]))


def test_only_the_last_answer_of_a_conversation_counts(emma: Emma) -> None:
    """Training has both answers of the sample in its loss; what remains is that of the first one."""
    (last,) = generator(emma).answer_likelihoods([QUESTIONS[2]], ["yes"])
    first_turn = conversation_request(
        "c", [("user", ["Left: ", QUESTIONS[2].images[0], " right: ", QUESTIONS[2].images[1], " Same?"])]
    )
    (first,) = generator(emma).answer_likelihoods([first_turn], ["no"])
    tokens = len(first.tokens) + len(last.tokens)
    total = training_loss(emma, QUESTIONS[2], "yes") * tokens
    assert -sum(first.tokens) - sum(last.tokens) == pytest.approx(total, abs=1e-5 * tokens)


def test_an_answer_that_the_model_writes_is_greedy_and_another_is_not(emma: Emma) -> None:
    (written,) = generator(emma).generate_text(QUESTIONS[:1], TextSettings(max_tokens=3))
    # Ids and not the text decide: the text of random ids may have other ids.
    ids = tokenizer().encode_user(written)
    likelihoods = generator(emma).answer_likelihoods([QUESTIONS[0]] * 2, [written, written + " cat"])
    assert len(likelihoods[0].tokens) == len(ids) + 1
    assert [likelihood.is_greedy for likelihood in likelihoods] == [len(ids) == 3, False]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 200))
def test_batches_by_length_have_every_request_once_and_keep_to_both_limits(
    lengths: list[int], max_samples: int, max_tokens: int
) -> None:
    batches = batches_by_length(lengths, max_samples, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) <= max_samples
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    for batch, following in zip(batches, batches[1:], strict=False):
        more = len(batch) + 1
        assert more > max_samples or more * lengths[batch[0]] > max_tokens, following


@pytest.mark.parametrize(("max_samples", "max_tokens"), [(64, 10_000), (2, 10_000), (64, 100), (1, 1)])
def test_batches_answer_and_weigh_as_single_requests_do(emma: Emma, max_samples: int, max_tokens: int) -> None:
    ours, settings = generator(emma), TextSettings(max_tokens=8)
    done: list[int] = []
    texts = generate_texts(ours, QUESTIONS, settings, max_samples, max_tokens, done.append)
    assert texts == [ours.generate_text([request], settings)[0] for request in QUESTIONS]
    assert len(set(texts)) == len(texts) and sum(done) == len(texts)
    together = answer_likelihoods(ours, QUESTIONS, ANSWERS, max_samples, max_tokens)
    for request, answer, likelihood in zip(QUESTIONS, ANSWERS, together, strict=True):
        (alone,) = ours.answer_likelihoods([request], [answer])
        np.testing.assert_allclose(likelihood.tokens, alone.tokens, rtol=0, atol=1e-5)


@pytest.mark.seconds
def test_images_of_a_batch_are_those_of_single_requests(emma: Emma) -> None:
    """Through the real autoencoder, in levels of [0, 1]; 8 bits round to 1 / 255, so most pixels agree exactly."""
    autoencoder = Autoencoder(AutoencoderConfig(path=str(ASSETS / "autoencoder")), torch.device("cpu"))
    ours, settings = Generator(emma, autoencoder, tokenizer(), PATCH, SHUFFLE), FlowSettings(steps=3)
    requests = [
        Request("a", "t2i", "a red fish", size=(64, 64), seed=11),
        Request("b", "it2i", "add a hat", [make_image(2, 2, 4)], size=(64, 96), seed=12),
        Request("c", "t2i", "two dogs", size=(32, 64), seed=13),
    ]
    latents = ours.generate_latents(requests, settings)
    for request, latent in zip(requests, latents, strict=True):
        (alone,) = ours.generate_latents([request], settings)
        rows, columns = request.size[0] // 32, request.size[1] // 32
        one, other = (autoencoder.decode(x, rows, columns).numpy().astype(int) for x in (latent, alone))
        assert float((latent - alone).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()))
        assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-3


def test_an_answer_ends_before_the_first_stop_string(emma: Emma) -> None:
    ours = generator(emma)
    full = ours.generate_text(QUESTIONS, TextSettings(max_tokens=24))
    for first, last in ((3, 4), (5, 9), (0, 2)):
        stop = tuple(text[first:last] for text in full[:2])
        stopped = ours.generate_text(QUESTIONS, TextSettings(max_tokens=24, stop=stop))
        for text, cut in zip(full, stopped, strict=True):
            at = min([position for s in stop if (position := text.find(s)) >= 0], default=len(text))
            assert cut == text[:at]
    assert ours.generate_text(QUESTIONS, TextSettings(max_tokens=24, stop=("\x00",))) == full


def test_a_stop_string_saves_the_forwards_after_it(emma: Emma) -> None:
    ours = generator(emma)
    (full,) = ours.generate_text(QUESTIONS[:1], TextSettings(max_tokens=24))
    calls: list[int] = []
    hook = emma.decoder.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    ours.generate_text(QUESTIONS[:1], TextSettings(max_tokens=24, stop=(full[:2],)))
    hook.remove()
    assert 1 <= len(calls) <= 3
