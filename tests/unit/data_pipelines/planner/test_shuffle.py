"""The order of samples: every row once per epoch; windows and epochs differ; weights hold in any run of positions."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.planner.costs import SampleCosts
from data_pipelines.planner.shuffle import Shard, ShuffledShards, WeightedInterleave, interleave_pattern


def columns_of(shards: Any, epoch: int) -> SampleCosts:
    """Samples that have nothing but a key."""
    keys = [f"{shard.name}/{row}" for shard in shards for row in range(shard.num_rows)]
    none = np.zeros(len(keys), dtype=np.int64)
    return SampleCosts(
        keys=pa.array(keys),
        shard=none,
        shards=[],
        offset=none,
        size=none,
        crc32=none,
        alternative=none,
        num_tokens=none + 1,
        num_visual=none,
        sizes=none[None],
        cost=none,
        max_tokens=none,
        too_long=none > 0,
        unsuitable=none > 0,
        stem=none,
    )


def pool(sizes: list[int], window: int = 8, seed: int = 0, name: str = "i2t") -> ShuffledShards:
    shards = [Shard("folder", f"s{i}", f"{i}", "", size) for i, size in enumerate(sizes)]
    return ShuffledShards(shards, columns_of, seed, name, window)


def keys(interleave: WeightedInterleave | ShuffledShards, first: int, count: int) -> list[str]:
    result = [""] * count
    for indices, _, costs, rows in interleave.rows(np.arange(first, first + count)):
        for index, row in zip(indices.tolist(), rows.tolist(), strict=True):
            result[index] = costs.keys[row].as_py()
    return result


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any),
    window=st.integers(1, 50),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_has_every_row_once_whatever_the_shards(sizes: list[int], window: int, epoch: int) -> None:
    rows = pool(sizes, window)
    got = keys(rows, epoch * rows.num_rows, rows.num_rows)
    assert Counter(got) == {f"s{i}/{row}": 1 for i, size in enumerate(sizes) for row in range(size)}


def test_any_position_is_the_same_whoever_asks_and_in_whatever_order() -> None:
    sizes = [5, 1, 9, 30, 2, 17]
    straight = keys(pool(sizes), 0, 200)
    other = pool(sizes)
    for first in (150, 3, 64, 63, 0, 120):
        assert keys(other, first, 7) == straight[first : first + 7]


def test_epochs_seeds_and_pools_have_orders_of_their_own_and_shards_mix() -> None:
    sizes = [40] * 10
    one = pool(sizes, window=100)
    orders = [keys(one, 0, 400), keys(one, 400, 400), keys(pool(sizes, 100, seed=1), 0, 400)]
    orders.append(keys(pool(sizes, 100, name="t2i"), 0, 400))
    assert len({tuple(order) for order in orders}) == 4
    # A window of 100 rows takes three shards of 40; any run of 60 in it should meet all three.
    assert len({key.partition("/")[0] for key in orders[0][:60]}) == 3


def test_only_the_nearest_windows_are_kept() -> None:
    rows = pool([10] * 100, window=10)
    keys(rows, 0, 1000)
    assert len(rows._windows) <= 3


@pytest.mark.parametrize(
    ("weights", "length", "counts"),
    [([1, 1], 2, [1, 1]), ([2, 1], 3, [2, 1]), ([0.5, 0.25, 0.25], 4, [2, 1, 1]), ([6, 3], 3, [2, 1])],
)
def test_a_pattern_is_the_shortest_with_its_shares(weights: list[float], length: int, counts: list[int]) -> None:
    order = interleave_pattern(weights)
    assert len(order) == length
    assert np.bincount(order).tolist() == counts


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), first=st.integers(0, 10**9), num=st.integers(1, 300)
)
def test_every_run_of_a_blend_keeps_the_weights_within_one_or_two(weights: list[int], first: int, num: int) -> None:
    order = interleave_pattern(weights)
    run = order[np.arange(first, first + num) % len(order)]
    for number, weight in enumerate(weights):
        assert abs(int((run == number).sum()) - num * weight / sum(weights)) < 2


def test_each_pool_of_an_interleave_goes_through_its_own_epochs() -> None:
    small, large = pool([6], name="a"), pool([0, 20], name="b")
    interleave = WeightedInterleave([small, large], interleave_pattern([1, 2]))
    got = keys(interleave, 0, 60)
    assert Counter(key for key in got if key.startswith("s1")) == {f"s1/{i}": 2 for i in range(20)}
    counts = [key for key in got if key.startswith("s0")]
    assert len(counts) == 20
    assert all(Counter(counts[i : i + 6]) == {f"s0/{row}": 1 for row in range(6)} for i in (0, 6, 12))
    assert interleave.epochs(60) == pytest.approx(20 / 6)
    for position in (0, 1, 2, 17, 59):
        number, pool_position = interleave.locate(position)
        assert keys(interleave.pools[number], pool_position, 1) == [got[position]]
        assert interleave.position_of(number, pool_position, [0, 0]) == position
