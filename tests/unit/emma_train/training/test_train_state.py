"""The counters of a run, from checkpoints of any version."""

from dataclasses import asdict

from emma_train.training.step_totals import StepTotals
from emma_train.training.train_state import TrainState


def test_a_checkpoint_of_an_older_version_is_read() -> None:
    stored = {
        "step": 40,
        "seconds": 12.5,
        "skipped_steps": 1,
        "bad_samples": 9,
        "replaced_samples": 7,
        "left_out_samples": 2,
        "refused_samples": 3,
        "seen": {"i2t": 480, "t2i": 480, "it2i": 240},
    }
    state = TrainState.from_checkpoint(stored)
    assert (state.step, state.seconds, state.skipped_steps) == (40, 12.5, 1)
    assert (state.unreadable_samples, state.replaced_samples) == (9, 7)
    assert (state.dropped_samples, state.too_long_samples) == (2, 3)
    assert state.seen == {"i2t": 480, "t2i": 480, "it2i": 240}


def test_a_checkpoint_of_this_version_gives_the_same_state_back() -> None:
    state = TrainState(step=3, dropped_samples=2, seen={"i2t": 1})
    assert TrainState.from_checkpoint(asdict(state)) == state


def test_samples_of_a_step_are_added() -> None:
    counts = {"i2t": 1, "t2i": 2, "it2i": 3}
    state = TrainState(unreadable_samples=10, seen={"i2t": 100, "t2i": 100})
    state.add(
        StepTotals(
            {},
            counts,
            0,
            unreadable=4,
            replaced=3,
            dropped=1,
            failed=0,
            stop_requested=0,
            saves_ended=0,
            saves_failed=0,
        )
    )
    assert (state.unreadable_samples, state.replaced_samples, state.dropped_samples) == (14, 3, 1)
    assert state.seen == {"i2t": 101, "t2i": 102, "it2i": 3}
