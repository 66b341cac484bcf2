"""Packing: no sample is lost or taken twice, caps hold, slots are full and even, and no sample waits for long."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.planner.packing import Queue, Slots, deal, fill, look_ahead, spread, sums

CAP = 8192


def queue(rng: np.random.Generator, num: int, least: int, mean: float, share: int = 1, weight: float = 1.0) -> Queue:
    """Lognormal lengths from `least` on; a token costs `weight`."""
    tokens = least + rng.lognormal(np.log(mean), 0.8, num).clip(1, 4000).astype(int)
    counts = list(range(0, num - look_ahead(64) + 1, share))
    return Queue(counts, [tokens.tolist()], (tokens * weight).tolist())


def taken(slots: Slots, number: int) -> list[int]:
    return sorted(sample for slot in slots for owner, sample in slot if owner == number)


@given(seed=st.integers(0, 10**6), num_slots=st.sampled_from([1, 2, 12, 30]), shares=st.sampled_from([(1, 1), (2, 3)]))
def test_filled_slots_keep_the_ratio_and_the_caps_and_take_nothing_twice(
    seed: int, num_slots: int, shares: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    queues = [
        queue(rng, 60 * num_slots + 200, 20, 150, shares[0]),
        queue(rng, 60 * num_slots + 200, 256, 60, shares[1]),
    ]
    slots = fill(queues, num_slots, [CAP])
    assert slots is not None
    taken_by_queue = [taken(slots, number) for number in (0, 1)]
    assert all(len(set(samples)) == len(samples) for samples in taken_by_queue)
    units = {len(samples) / share for samples, share in zip(taken_by_queue, shares, strict=True)}
    assert len(units) == 1 and units.pop() >= 1
    costs, sizes = sums(queues, slots)
    assert max(size[0] for size in sizes) <= CAP
    assert sum(costs) == pytest.approx(
        sum(queues[n].costs[p] for n, samples in enumerate(taken_by_queue) for p in samples)
    )


@given(seed=st.integers(0, 10**6))
def test_slots_are_full_and_even_on_a_realistic_mix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queues = [queue(rng, 2500, 276, 120, weight=1.4), queue(rng, 2500, 271, 74)]
    slots = fill(queues, 64, [CAP])
    assert slots is not None
    costs, sizes = sums(queues, slots)
    # Of a first step; those after it have the skipped samples to choose from too (test_planner.py).
    assert sum(size[0] for size in sizes) / (64 * CAP) >= 0.985
    assert max(costs) / np.mean(costs) <= 1.05


def test_nobody_waits_for_more_than_a_few_steps() -> None:
    """Skipped samples come first in the next step, and the first half of a queue is always taken."""
    rng = np.random.default_rng(0)
    tokens = (20 + rng.lognormal(5, 1, 20_000).clip(1, 6000)).astype(int)
    skipped, next_position, waited = [], 0, dict[int, int]()
    for _ in range(40):
        positions = [*skipped, *range(next_position, next_position + 500)]
        sizes = tokens[positions].tolist()
        candidates = Queue(list(range(len(positions) - look_ahead(8) + 1)), [sizes], [float(s) for s in sizes])
        slots = fill([candidates], 8, [CAP])
        assert slots is not None
        taken_samples = taken(slots, 0)
        next_position = max(next_position, positions[taken_samples[-1]] + 1)
        skipped = [positions[sample] for sample in range(taken_samples[-1]) if sample not in set(taken_samples)]
        waited = {position: waited.get(position, 0) + 1 for position in skipped}
        assert max(waited.values(), default=0) <= 3


@given(seed=st.integers(0, 10**6))
def test_every_cap_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = queue(rng, 900, 20, 150)
    images = rng.integers(0, 400, 900)
    candidates.sizes.append(images.tolist())
    slots = fill([candidates], 12, [CAP, 2500])
    assert slots is not None
    for tokens, seen in sums([candidates], slots)[1]:
        assert tokens <= CAP and seen <= 2500


def test_what_cannot_fit_is_told() -> None:
    long = Queue([0, 1], [[CAP + 1] * 200], [1.0] * 200)
    assert fill([long], 4, [CAP]) is None
    assert spread([Queue([0, 3], [[3000] * 3], [1.0] * 3)], 1, [CAP]) is None
    assert spread([Queue([0, 4], [[3000] * 4], [1.0] * 4)], 2, [CAP]) is not None


@given(seed=st.integers(0, 10**6), num_slots=st.integers(1, 12), num=st.integers(1, 60))
def test_dealt_slots_hold_everything_and_as_many_each(seed: int, num_slots: int, num: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 500, (2, num))
    queues = [Queue([0, num], [of_queue.tolist()], of_queue.astype(float).tolist()) for of_queue in tokens]
    slots = deal(queues, num_slots)
    for number in (0, 1):
        assert taken(slots, number) == list(range(num))
        counts = [sum(owner == number for owner, _ in slot) for slot in slots]
        assert max(counts) - min(counts) <= 1
