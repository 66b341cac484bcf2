"""Packs: branch order, tables, labels and the order of images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_train.sequence.layout import ImageRole, ImageSegment, TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, pack
from tests.helpers import i2t_sample, mixed_samples, random_sample, t2i_sample

seeds = st.integers(0, 10**6)


def samples_of(seed: int, num: int = 3) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [random_sample(rng, f"s{i}") for i in range(num)]


def walk(samples: list[Sample]) -> list[tuple[int, int, int, int, int]]:
    """(group, sample, position, limit, id) of every token, in sample order, the slow way."""
    rows = []
    for index, sample in enumerate(samples):
        position = 0
        for segment in sample.segments:
            if isinstance(segment, TextSegment):
                rows += [(0, index, position + i, position + i, token) for i, token in enumerate(segment.ids)]
                position += len(segment.ids)
            else:
                height, columns = sample.images[segment.name].grid
                end = position + height * columns
                full = segment.role is not ImageRole.UND
                rows += [(int(segment.role), index, p, end - 1 if full else p, -1) for p in range(position, end)]
                position = end
    return rows


@given(seeds)
def test_tables_are_those_of_a_walk_through_the_segments(seed: int) -> None:
    samples = samples_of(seed)
    batch = pack(samples)
    # A stable sort by group is branch order.
    rows = sorted(walk(samples), key=lambda row: row[0])
    assert batch.counts == tuple(sum(row[0] == group for row in rows) for group in range(4))
    assert batch.sample.tolist() == [row[1] for row in rows]
    assert batch.position.tolist() == [row[2] for row in rows]
    assert batch.limit.tolist() == [row[3] for row in rows]
    assert batch.text_ids.tolist() == [row[4] for row in rows if row[0] == 0]
    assert batch.max_length == max(s.num_tokens for s in samples)
    assert batch.num_und == batch.counts[0] + batch.counts[1] and batch.num_tokens == len(rows)


@given(seeds)
def test_every_token_is_there_once(seed: int) -> None:
    samples = samples_of(seed)
    batch = pack(samples)
    places = set(zip(batch.sample.tolist(), batch.position.tolist(), strict=True))
    assert len(places) == batch.num_tokens
    assert places == {(i, p) for i, s in enumerate(samples) for p in range(s.num_tokens)}


@given(seeds)
def test_the_token_after_a_predictor_is_its_label(seed: int) -> None:
    samples = samples_of(seed)
    batch = pack(samples)
    id_at = {(row[1], row[2]): row[4] for row in walk(samples)}
    for predictor, label in zip(batch.predictors.tolist(), batch.labels.tolist(), strict=True):
        assert predictor < batch.num_und
        assert id_at[int(batch.sample[predictor]), int(batch.position[predictor]) + 1] == label
    supervised = [t for s in samples for x in s.segments if isinstance(x, TextSegment) and x.supervised for t in x.ids]
    assert batch.labels.tolist() == supervised


@given(seeds)
def test_two_samples_packed_are_each_alone(seed: int) -> None:
    samples = samples_of(seed, 2)
    both = pack(samples)
    for index, sample in enumerate(samples):
        alone, of_sample = pack([sample]), both.sample == index
        assert torch.equal(both.position[of_sample], alone.position) and torch.equal(both.limit[of_sample], alone.limit)
        assert torch.equal(both.text_ids[both.sample[: both.counts[0]] == index], alone.text_ids)
        assert (alone.sample == 0).all()
        renumbered = torch.cumsum(of_sample, 0) - 1
        predicts = of_sample[both.predictors]
        assert torch.equal(renumbered[both.predictors[predicts]], alone.predictors)
        assert torch.equal(both.labels[predicts], alone.labels)
        if both.latents is not None:
            visual = of_sample[both.counts[0] :]
            expected = alone.latents if alone.latents is not None else torch.zeros(0, both.latents.shape[1])
            assert torch.equal(both.latents[visual], expected)


def images_in_stream_order(samples: list[Sample]) -> list[tuple[Sample, ImageSegment]]:
    images = [(s, x) for s in samples for x in s.segments if isinstance(x, ImageSegment)]
    return sorted(images, key=lambda pair: pair[1].role)


def test_latents_and_patches_stand_in_stream_order_and_cached_targets_bring_no_patches() -> None:
    samples = mixed_samples()
    batch, order = pack(samples), images_in_stream_order(samples)
    assert batch.latents is not None
    assert torch.equal(batch.latents, torch.cat([torch.from_numpy(s.images[x.name].latent) for s, x in order]))
    seen = [s.images[x.name].patches for s, x in order if x.role is not ImageRole.TARGET]
    assert np.array_equal(batch.patches.numpy(), np.concatenate(seen))
    assert [(role.name, grids) for role, grids in batch.grids.items()] == [
        ("UND", [(2, 2), (1, 3), (2, 2)]),
        ("REFERENCE", [(2, 3)]),
        ("TARGET", [(3, 2), (2, 2)]),
    ]
    assert batch.stem.tolist() == [0, 1, 1] and batch.tasks == ["i2t", "it2i", "t2i", "i2t"]


def test_without_every_latent_all_images_bring_patches() -> None:
    samples = mixed_samples()
    samples[2].images["target"].latent = None
    batch, order = pack(samples), images_in_stream_order(samples)
    assert batch.latents is None
    assert np.array_equal(batch.patches.numpy(), np.concatenate([s.images[x.name].patches for s, x in order]))


def test_an_image_to_be_seen_needs_its_patches() -> None:
    samples = mixed_samples()
    samples[0].images["img0"].patches = None
    with pytest.raises(ValueError, match="without patches"):
        pack(samples)


def test_targets_know_their_seeds_and_tasks() -> None:
    samples = mixed_samples()
    batch = pack(samples)
    assert batch.target_tasks == ["it2i", "t2i"]
    assert batch.noise_seeds.tolist() == [samples[1].noise_seed, samples[2].noise_seed]
    assert batch.time_seeds.tolist() == [samples[1].time_seed, samples[2].time_seed]
    assert batch.target_of_token.tolist() == [0] * 6 + [1] * 4
    assert batch.num_target_tokens == {"it2i": 6, "t2i": 4}


@pytest.mark.parametrize(
    "samples", [[i2t_sample(grids=[])], [t2i_sample()], [i2t_sample()]], ids=["text", "generation", "understanding"]
)
def test_empty_groups_have_empty_tables_of_the_right_type(samples: list[Sample]) -> None:
    batch = pack(samples)
    for name in (
        "text_ids",
        "sample",
        "position",
        "limit",
        "predictors",
        "labels",
        "noise_seeds",
        "target_of_token",
        "stem",
    ):
        assert getattr(batch, name).dtype == torch.int64, name
    assert sum(batch.counts) == len(batch.sample) == samples[0].num_tokens


def test_moving_to_a_device_moves_every_tensor() -> None:
    moved: PackedBatch = pack(mixed_samples()).to(torch.device("meta"))
    tensors = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
    assert len(tensors) == 14 and all(t.device.type == "meta" for t in tensors.values())
    assert moved.keys == ["q0", "e0", "p0", "q1"] and moved.num_dropped == 0
