"""A rank that dies or stops is named, though the main threads of the others wait in a call that never returns."""

import time

import pytest

from emma_train.engine.heartbeat import BeatCounts
from tests.distributed.collective_ranks import wait_forever
from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize(
    ("how", "victim", "codes", "message"),
    [
        ("killed", 1, [1, -9, 1], "rank 1 of 3 died or hangs: no sign of life in 9 s"),
        ("stopped", 1, [1, -9, 1], "rank 1 of 3 died or hangs: no sign of life in 9 s"),
        ("failed", 2, [1, 1, 1], "rank 2 of 3 failed: a bad day"),
        # The store is kept by rank 0, so both others report it.
        ("killed", 0, [-9, 1, 1], "rank 0 of 3 died: the store that it keeps does not answer"),
        ("stopped", 0, [-9, 1, 1], "rank 0 of 3 died: the store that it keeps does not answer"),
    ],
)
def test_the_others_end_and_name_the_rank(how: str, victim: int, codes: list[int], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_ranks(3, wait_forever, victim, how, timeout_s=90, grace_s=6 if how == "stopped" else 20)
    text = str(failure.value)
    assert f"exit codes {codes}" in text
    assert text.count(message) == (2 if victim == 0 else 1), text
    assert time.monotonic() - started < 80


def test_a_rank_that_leaves_early_is_not_missed() -> None:
    run_ranks(3, wait_forever, 1, "left")


def test_silence_is_counted_from_the_last_change() -> None:
    counts = BeatCounts(silent_s=60, tolerance_s=10)
    counts.update({0: b"1", 1: b"1", 2: b"1", 3: b"1"}, now=0)
    counts.update({0: b"9", 1: b"1", 2: b"2", 3: b"ended"}, now=5)
    assert counts.silent(now=60) == []
    counts.update({0: b"99", 1: b"1", 2: b"2", 3: b"ended"}, now=61)
    assert counts.silent(now=61) == [1, 2]  # both within the tolerance: a machine with two ranks went down
    assert counts.silent(now=200) == [0, 1, 2]
