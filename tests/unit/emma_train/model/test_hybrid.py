"""Who sees whom, in the whole model: change one token and look at which outputs move.

A latent reaches its own token only (the vision encoder mixes patches, latents are fused per token), so a changed latent
is a change of exactly one visual token.
"""

import pytest
import torch
from torch import Tensor

from emma_train.model.emma import Emma
from emma_train.sequence.layout import ImageRole, TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, pack
from tests.helpers import i2t_sample, it2i_sample, scaled_latents, t2i_sample, tiny_emma

SAMPLES = {
    "question": [i2t_sample("q", [(2, 2), (1, 2)], answer="a cat"), i2t_sample("r", [(2, 3)])],
    "generation": [t2i_sample("p", (2, 3)), t2i_sample("o", (2, 2), text="two cats")],
    "editing": [it2i_sample("e", (2, 2), (2, 3)), it2i_sample("f", (1, 2), (2, 2))],
    "mixed": [i2t_sample("q"), it2i_sample("e"), t2i_sample("p")],
}


@pytest.fixture(scope="module")
def model() -> Emma:
    return tiny_emma().eval()


def sees(samples: list[Sample]) -> Tensor:
    """bool [T, T] in stream order, from the segments and the paper's §2.2 alone, without the pack's tables."""
    tokens = []
    for index, sample in enumerate(samples):
        for number, segment in enumerate(sample.segments):
            group = 0 if isinstance(segment, TextSegment) else int(segment.role)
            grid = (len(segment.ids), 1) if isinstance(segment, TextSegment) else sample.images[segment.name].grid
            tokens += [(group, index, number, i) for i in range(grid[0] * grid[1])]
    tokens.sort(key=lambda token: token[0])

    def one(q: tuple[int, int, int, int], k: tuple[int, int, int, int]) -> bool:
        if q[1] != k[1] or k[2] > q[2]:
            return False
        full_within = q[0] in (ImageRole.REFERENCE, ImageRole.TARGET)
        return k[2] < q[2] or full_within or k[3] <= q[3]

    return torch.tensor([[one(q, k) for k in tokens] for q in tokens])


@torch.no_grad()
def states(model: Emma, batch: PackedBatch, latents: Tensor, time: Tensor) -> Tensor:
    """Hidden states after the final norm: [T, hidden]."""
    kept: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        model(batch, latents, time)
    finally:
        hook.remove()
    return kept[0]


def moved(before: Tensor, after: Tensor) -> Tensor:
    """bool [T]: rows that are not the same to the last bit."""
    return (before != after).any(-1)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_changed_token_moves_exactly_those_that_may_see_it(model: Emma, name: str) -> None:
    samples = SAMPLES[name]
    batch, expected = pack(samples), sees(samples)
    latents, time = scaled_latents(batch), torch.linspace(0.1, 0.9, batch.counts[3])
    before = states(model, batch, latents, time)
    for token in range(batch.num_tokens):
        changed = latents.clone()
        if token < batch.counts[0]:
            kept = int(batch.text_ids[token])
            batch.text_ids[token] = (kept + 17) % 1000
            after = states(model, batch, latents, time)
            batch.text_ids[token] = kept
        else:
            changed[token - batch.counts[0]] += 1.0
            after = states(model, batch, changed, time)
        assert torch.equal(moved(before, after), expected[:, token]), f"token {token} of {name}"


def test_an_understanding_image_is_causal_and_an_image_of_generation_is_full(model: Emma) -> None:
    # The same claim, on the hidden states of two images of 2 x 3.
    for sample, role in ((i2t_sample("q", [(2, 3)]), 1), (t2i_sample("p", (2, 3)), 3), (it2i_sample("e", (2, 3)), 2)):
        batch = pack([sample])
        start = sum(batch.counts[:role])
        latents, time = scaled_latents(batch), torch.full((batch.counts[3],), 0.5)
        changed = latents.clone()
        changed[start - batch.counts[0] + 5] += 1.0
        rows = moved(states(model, batch, latents, time), states(model, batch, changed, time))[start : start + 6]
        assert rows.tolist() == ([False] * 5 + [True] if role == 1 else [True] * 6)


def test_the_target_and_its_time_do_not_leak_to_reference_and_text(model: Emma) -> None:
    batch = pack([it2i_sample("e", (2, 2), (2, 3))])
    latents, time = scaled_latents(batch), torch.full((6,), 0.5)
    before = states(model, batch, latents, time)
    changed = latents.clone()
    changed[-6:] = 9.0
    for after in (states(model, batch, changed, time), states(model, batch, latents, time + 0.3)):
        assert moved(before, after).tolist() == [False] * (batch.num_tokens - 6) + [True] * 6


def test_a_changed_patch_stays_within_its_image_and_what_follows_it(model: Emma) -> None:
    samples = [i2t_sample("q", [(2, 2), (2, 2)]), i2t_sample("r"), it2i_sample("e")]
    batch = pack(samples)
    latents, time = scaled_latents(batch), torch.full((batch.counts[3],), 0.5)
    before, expected = states(model, batch, latents, time), sees(samples)
    batch.patches[16 + 15] = 255 - batch.patches[16 + 15]  # last patch of the second image of q
    after = moved(before, states(model, batch, latents, time))
    first = batch.counts[0] + 4  # its vision encoder is full, so the image's first token moves already
    assert torch.equal(after, expected[:, first])


def test_packed_samples_give_what_each_gives_alone(model: Emma) -> None:
    samples = SAMPLES["mixed"]
    batch = pack(samples)
    time = torch.linspace(0.1, 0.9, batch.counts[3])
    together = states(model, batch, scaled_latents(batch), time)
    worst = 0.0
    for index, sample in enumerate(samples):
        of_sample, alone = batch.sample == index, pack([sample])
        got = states(model, alone, scaled_latents(alone), time[of_sample[batch.num_tokens - batch.counts[3] :]])
        worst = max(worst, float((together[of_sample] - got).abs().max()))
    assert worst < 1e-5
