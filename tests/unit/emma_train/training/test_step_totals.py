"""The counts of a step: to a vector and back by name, and summed over ranks."""

from dataclasses import asdict, dataclass, field, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emma_train.config.mix import TASK_NAMES as TASKS
from emma_train.sequence.pack import pack
from emma_train.sequence.step_batches import StepBatches, UnreadableSample
from emma_train.training.step_totals import IN_PACKS, StepTotals, local_totals
from tests.helpers import mixed_samples

NOTHING = StepTotals({}, {}, 0, 0, 0, 0, 0, 0, 0, 0)
IN_PACKS_NAMES = {"loss_tokens", "samples", "tokens", "unreadable", "replaced", "dropped"}
PER_TASK = st.fixed_dictionaries(dict.fromkeys(TASKS, st.integers(0, 2**40)))
TOTALS = st.builds(
    StepTotals,
    **{f.name: PER_TASK if f.name in ("loss_tokens", "samples") else st.integers(0, 2**40) for f in fields(StepTotals)},
)


@given(TOTALS)
@settings(max_examples=50, derandomize=True)
def test_a_vector_gives_the_same_totals_back(totals: StepTotals) -> None:
    assert totals.from_vector(totals.to_vector(), sp_size=1) == totals


@given(TOTALS, st.integers(1, 4))
@settings(max_examples=50, derandomize=True)
def test_sums_over_ranks_that_share_packs_count_each_pack_once(totals: StepTotals, sp_size: int) -> None:
    """All `sp_size` ranks have counted the same packs; what they count of themselves is added up."""
    sums = totals.from_vector([sp_size * number for number in totals.to_vector()], sp_size)
    for name, value in asdict(totals).items():
        if name in IN_PACKS_NAMES:
            assert getattr(sums, name) == value, name
        else:
            assert getattr(sums, name) == sp_size * value, name


def test_a_share_of_a_pack_counts_as_one() -> None:
    """A rank that cannot read a sample that the other ranks of its pack could read."""
    totals = StepTotals(
        {}, {}, 0, unreadable=1, replaced=0, dropped=0, failed=1, stop_requested=1, saves_ended=0, saves_failed=0
    )
    sums = totals.from_vector(totals.to_vector(), sp_size=2)
    assert (sums.unreadable, sums.failed, sums.stop_requested) == (1, 1, 1)


def test_keys_travel_by_name_whatever_their_order() -> None:
    counts = {"i2t": 1, "t2i": 2, "it2i": 3}
    one = StepTotals(counts, counts, 4, 5, 6, 7, 8, 9, 10, 11)
    other = StepTotals(dict(reversed(counts.items())), counts, 4, 5, 6, 7, 8, 9, 10, 11)
    assert one.to_vector() == other.to_vector()
    assert other.from_vector(one.to_vector(), 1) == one


def test_a_new_field_shifts_nothing() -> None:
    @dataclass(frozen=True)
    class WithMore(StepTotals):
        more: dict[str, int] = field(default_factory=lambda: {"b": 20, "a": 10}, metadata=IN_PACKS)
        ranks: int = 3

    counts = {"i2t": 1, "t2i": 2, "it2i": 3}
    totals = WithMore(counts, counts, 4, 5, 6, 7, 8, 9, 10, 11)
    sums = totals.from_vector([2 * number for number in totals.to_vector()], sp_size=2)
    assert isinstance(sums, WithMore)
    assert sums.more == {"a": 10, "b": 20} and sums.ranks == 6
    assert (sums.samples, sums.failed, sums.saves_failed) == (counts, 16, 22)


def test_a_vector_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        NOTHING.from_vector([0.0] * 9, 1)


def test_what_a_rank_counts() -> None:
    batch = pack(mixed_samples(), num_dropped=2)
    unreadable = [UnreadableSample("key", "i2t", "shard", "reason")] * 3
    data = StepBatches(1, [batch, batch], "", 1.0, unreadable, 0.0, replaced=1, failure=RuntimeError())
    totals = local_totals(data, "tokens", True, [1.0, 0.0])
    assert totals.loss_tokens["i2t"] == 2 * len(batch.labels)
    assert totals.loss_tokens["t2i"] == 2 * batch.num_target_tokens["t2i"]
    assert totals.samples == {task: 2 * batch.tasks.count(task) for task in TASKS}
    assert totals.tokens == 2 * batch.num_tokens
    assert (totals.unreadable, totals.replaced, totals.dropped, totals.failed) == (3, 1, 4, 1)
    assert (totals.stop_requested, totals.saves_ended, totals.saves_failed) == (1, 1, 0)
