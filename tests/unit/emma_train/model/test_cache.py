"""A pack that is continued gives what the whole pack gives, wherever its samples are cut."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emma_train.model.cache import KVCache
from emma_train.sequence.layout import TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, continued, pack
from tests.helpers import clone_sample, random_sample, scaled_latents, t2i_sample, tiny_emma

MODEL = tiny_emma().eval()


@torch.no_grad()
def run(batch: PackedBatch, cache: KVCache | None = None) -> dict[tuple[int, int], Tensor]:
    """Logits of text tokens and velocities of target tokens, by (sample, position)."""
    batch.predictors = torch.arange(batch.counts[0])
    # A time that tells targets apart, whichever pack they are in.
    time = (batch.noise_seeds % 97 / 97.0)[batch.target_of_token]
    out = MODEL(batch, scaled_latents(batch), time.float(), cache=cache)
    assert out.logits is not None
    places = list(zip(batch.sample.tolist(), batch.position.tolist(), strict=True))
    num_text, num_target = batch.counts[0], batch.counts[3]
    places = places[:num_text] + places[len(places) - num_target :]
    return dict(zip(places, [*out.logits, *out.velocity], strict=True))


def segments(sample: Sample, start: int, stop: int) -> Sample:
    part = clone_sample(sample)
    part.segments = sample.segments[start:stop]
    return part


@given(st.integers(0, 10**6))
def test_a_continued_pack_is_the_whole_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [random_sample(rng, f"s{i}") for i in range(int(rng.integers(1, 4)))]
    for sample in samples:
        # Something for three packs each, and no labels: their predictors may stand in the pack before.
        sample.segments += [TextSegment((7, 8)), TextSegment((9,))]
        sample.segments = [TextSegment(s.ids) if isinstance(s, TextSegment) else s for s in sample.segments]
    cuts = [[0, *sorted(rng.choice(np.arange(1, len(s.segments)), 2, replace=False)), len(s.segments)] for s in samples]
    cache = KVCache(len(samples), max(s.num_tokens for s in samples) + 3)
    want, got = run(pack(samples)), {}
    for n in range(3):
        parts = [segments(s, cut[n], cut[n + 1]) for s, cut in zip(samples, cuts, strict=True)]
        before = [segments(s, 0, cut[n]) for s, cut in zip(samples, cuts, strict=True)]
        got |= run(continued(pack(parts), before), cache)
    assert got.keys() == want.keys()
    assert max(float((got[key] - value).abs().max()) for key, value in want.items()) <= 1e-5


def test_a_target_replaces_the_one_before_it() -> None:
    """Steps of the flow: the same places again and again, and nothing is left of the last time."""
    sample = t2i_sample(grid=(2, 3))
    head, target = segments(sample, 0, -1), segments(sample, len(sample.segments) - 1, len(sample.segments))
    cache = KVCache(1, sample.num_tokens)
    run(pack([head]), cache)
    ways = []
    for factor in (1.0, -2.0, 1.0):
        batch = continued(pack([target]), [head])
        assert batch.latents is not None
        batch.latents = factor * batch.latents
        ways.append(torch.stack(list(run(batch, cache).values())))
    assert torch.equal(ways[0], ways[2]) and float((ways[0] - ways[1]).abs().max()) > 1e-3


def test_continued_packs_start_where_their_samples_stopped() -> None:
    before = [Sample(k, "i2t", [TextSegment((1,) * num)], {}) for k, num in (("a", 3), ("b", 10))]
    batch = continued(pack([Sample(k, "i2t", [TextSegment((1, 2))], {}) for k in "ab"]), before)
    assert batch.position.tolist() == [3, 4, 10, 11] == batch.limit.tolist()
