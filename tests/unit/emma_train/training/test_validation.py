"""What validation measures beside the losses: exact answers without generating text, and the copied source."""

import torch

from emma_train.config.schema import FlowConfig
from emma_train.generate.generator import Generator
from emma_train.generate.settings import TextSettings
from emma_train.objectives.flow import draw_time
from emma_train.objectives.next_token import next_token_loss
from emma_train.sequence import layout
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack
from emma_train.sequence.request import Request
from emma_train.training.validation import copy_losses, right_answers
from tests.helpers import (
    PATCH,
    SHUFFLE,
    FakeAutoencoder,
    i2t_sample,
    it2i_sample,
    scaled_latents,
    t2i_sample,
    tiny_emma,
    tokenizer,
)

FLOW = FlowConfig()


def test_an_answer_is_right_where_every_token_is_the_likeliest() -> None:
    batch = pack([i2t_sample("a", answer="a cat"), i2t_sample("b", answer="two red apples"), i2t_sample("c")])
    logits = torch.nn.functional.one_hot(batch.labels, 1024).float()
    assert right_answers(logits, batch).tolist() == [True, True, True]
    owners = batch.sample[batch.predictors]
    last = int(torch.nonzero(owners == 1)[-1])  # the token that ends the answer
    logits[last] = logits[last].roll(1)
    assert right_answers(logits, batch).tolist() == [True, False, True]


def test_answers_that_are_right_are_those_that_the_model_writes() -> None:
    """Trained on four of eight questions, the model writes some of the answers exactly."""
    words = ["a cat", "two red apples", "a blue fish on a plate", "no", "yes", "a dog", "seven", "green"]
    samples = [_question(f"Which is number {n} of {n * n}?", word) for n, word in enumerate(words)]
    model, batch, learnt = tiny_emma(), pack(samples), pack(samples[:4])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        next_token_loss(_logits(model, learnt), learnt.labels).mean().backward()
        optimizer.step()
    right = right_answers(_logits(model, batch).detach(), batch).tolist()
    generator = Generator(model, FakeAutoencoder(), tokenizer(), PATCH, SHUFFLE)  # type: ignore[arg-type]
    requests = [Request(s.key, "i2t", s.key, seed=0) for s in samples]
    written = generator.generate_text(requests, TextSettings(max_tokens=24))
    assert right == [text == word for text, word in zip(written, words, strict=True)]
    assert 3 <= sum(right) < 8


def test_a_copied_source_costs_its_distance_over_the_squared_time() -> None:
    """In words: a model that takes the reference x' for the target x errs by |x - x'|² / t²."""
    edits = [it2i_sample(f"e{n}", seed=n) for n in range(3)]
    batch = pack([t2i_sample("p"), *edits, i2t_sample("q")])
    latents = scaled_latents(batch)
    measured = copy_losses(batch, latents, FLOW)
    assert [task for task, _ in measured] == ["it2i"] * 3
    times = draw_time(batch.time_seeds, FLOW)[1:]
    for edit, time, (_, loss) in zip(edits, times, measured, strict=True):
        source, target = (torch.from_numpy(edit.images[name].latent) * 0.5 for name in ("img0", "target"))
        torch.testing.assert_close(loss, (target - source).square().mean(-1) / time**2, rtol=1e-3, atol=1e-4)


def test_a_target_that_is_the_source_costs_nothing_and_one_of_another_grid_has_no_baseline() -> None:
    same, other = it2i_sample("same"), it2i_sample("other", reference=(2, 3), grid=(3, 2))
    same.images["img0"] = ImageTokens(**vars(same.images["target"]))
    batch = pack([other, same])
    ((task, loss),) = copy_losses(batch, scaled_latents(batch), FLOW)
    assert task == "it2i" and len(loss) == 4
    assert loss.max() < 1e-9


def _question(text: str, answer: str) -> Sample:
    return Sample(text, "i2t", layout.understanding(tokenizer(), [], [("user", text), ("assistant", answer)]), {})


def _logits(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    return model(batch, torch.zeros(0, 32), torch.zeros(0)).logits
