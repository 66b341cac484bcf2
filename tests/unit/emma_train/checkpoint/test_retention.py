"""Which checkpoints are kept and removed; the newest valid one is always kept."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.retention import prune, steps_to_keep
from emma_train.config.schema import TrainConfig
from emma_train.storage.paths import storage_of
from tests.unit.emma_train.checkpoint.folders import names, truncate, write, write_frozen


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write(path, step)
    return path


@pytest.mark.parametrize(
    ("last", "every", "values", "left"),
    [
        (1, 0, {}, {50}),
        (2, 0, {}, {40, 50}),
        (9, 0, {}, {10, 20, 30, 40, 50}),
        (0, 0, {}, {50}),
        (1, 20, {}, {20, 40, 50}),
        (1, 0, {20: 0.3, 30: 0.1, 50: 0.2}, {30, 50}),
        (1, 0, {20: 0.1, 30: 0.1}, {30, 50}),
        (1, 40, {10: 0.0}, {10, 40, 50}),
        (1, 0, {10: float("nan"), 20: 2.0, 30: float("inf")}, {20, 50}),
    ],
)
def test_the_last_every_nth_and_the_best_stay(last: int, every: int, values: dict[int, float], left: set[int]) -> None:
    assert steps_to_keep({step: values.get(step) for step in (10, 20, 30, 40, 50)}, last, every) == left


@given(
    st.dictionaries(st.integers(1, 200), st.one_of(st.none(), st.floats(0, 9)), min_size=1),
    st.integers(0, 5),
    st.integers(0, 50),
)
def test_the_newest_always_stays_and_nothing_is_made_up(steps: dict[int, float | None], last: int, every: int) -> None:
    stay = steps_to_keep(steps, last, every)
    assert max(steps) in stay
    assert stay <= steps.keys()
    # Pruning what is left again removes nothing: a best or a for-good checkpoint does not lose its place by it.
    assert steps_to_keep({step: steps[step] for step in stay}, last, every) == stay


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (9, [10, 20, 30])])
def test_prune_keeps_the_newest(checkpoints: Path, keep: int, left: list[int]) -> None:
    folders.start_folder(checkpoints, "step-00000040")
    prune(checkpoints, TrainConfig(steps=99, keep=keep))
    assert names(checkpoints) == ["latest", *(folders.step_name(step) for step in left)]


def test_a_torn_folder_does_not_replace_the_valid_one_that_a_run_needs(checkpoints: Path) -> None:
    # A run that resumed from 20 because 30 is torn, and saves at 25 with keep=1.
    truncate(checkpoints / "step-00000030")
    write(checkpoints, 25)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00000025"


def test_a_damaged_one_can_be_inspected_until_there_is_a_newer_one(checkpoints: Path) -> None:
    storage_of(checkpoints).set_aside(checkpoints / "step-00000030")
    write(checkpoints, 25)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(checkpoints) == ["latest", "step-00000025", "step-00000030.damaged"]
    write(checkpoints, 40)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(checkpoints) == ["latest", "step-00000040"]


def test_the_best_is_kept_by_the_metric_that_its_metadata_says(checkpoints: Path) -> None:
    for step, loss in ((40, 2.0), (50, 1.0), (60, 3.0)):
        write(checkpoints, step, metrics={"loss": loss, "loss/i2t": -loss})
    prune(checkpoints, TrainConfig(steps=99, keep=1, keep_best="loss"))
    assert names(checkpoints) == ["latest", "step-00000050", "step-00000060"]


def test_the_most_right_answers_and_the_lowest_validation_loss_are_best(checkpoints: Path) -> None:
    for step, answers in ((40, 0.2), (50, 0.9), (60, 0.5)):
        write(checkpoints, step, metrics={"val/answers": answers, "val/loss": answers})
    prune(checkpoints, TrainConfig(steps=99, keep=2, keep_best="val/answers"))
    assert names(checkpoints) == ["latest", "step-00000050", "step-00000060"]
    write(checkpoints, 70)  # a checkpoint whose step had no validation
    prune(checkpoints, TrainConfig(steps=99, keep=1, keep_best="val/loss"))
    assert names(checkpoints) == ["latest", "step-00000060", "step-00000070"]


def test_frozen_weights_stay_as_long_as_a_checkpoint_refers_to_them(checkpoints: Path) -> None:
    used, unused = write_frozen(checkpoints), write_frozen(checkpoints, b"of no checkpoint")
    write(checkpoints, 40, frozen=used)
    write(checkpoints, 50, frozen=used)
    folders.start_folder(checkpoints / "frozen", "new")
    assert names(checkpoints / "frozen") == sorted([used, unused, "new.tmp"])
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(checkpoints / "frozen") == [used]
    write(checkpoints, 60)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(checkpoints / "frozen") == []
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00000060"


def test_nothing_is_removed_where_nothing_is_valid(checkpoints: Path) -> None:
    for step in (10, 20, 30):
        truncate(checkpoints / folders.step_name(step))
    before = names(checkpoints)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(checkpoints) == before
