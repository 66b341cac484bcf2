"""Checkpoints of several ranks hold the state at the save, whatever changes, fails or hangs during the save."""

from functools import partial
from pathlib import Path

import pytest
import torch

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from tests.distributed import saving
from tests.distributed.spawn import run_ranks
from tests.runs import differences, stored


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("save_async", [True, False])
def test_a_checkpoint_holds_the_weights_of_its_step_though_training_goes_on(tmp_path: Path, save_async: bool) -> None:
    outcomes = run_ranks(2, partial(saving.saved, save_async=save_async), tmp_path, 3)
    assert differences(stored(tmp_path / "step-00000003"), outcomes[0].value) == []
    assert names(tmp_path) == ["frozen", "latest", "step-00000003"]
    assert verify.find_damage(tmp_path / "step-00000003") is None
    moments = [value for name, value in outcomes[0].value.items() if ".exp_avg" in name]
    assert len(moments) == 6 and all(value.abs().sum() > 0 for value in moments)
    assert {float(value) for name, value in outcomes[0].value.items() if name.endswith(".step")} == {3.0}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 2), (2, 3), (3, 1)])
def test_any_number_of_ranks_goes_on_from_it_as_one_would(tmp_path: Path, before: int, after: int) -> None:
    straight = run_ranks(1, saving.saved, tmp_path / "straight", 5)[0].value
    run_ranks(before, saving.saved, tmp_path / "run", 3)
    at_three = stored(tmp_path / "run" / "step-00000003")
    outcomes = run_ranks(after, saving.resumed, tmp_path / "run", 2)
    for outcome in outcomes:
        loaded, end = outcome.value
        assert differences(loaded, at_three) == []
        # Another division of a tensor may round its last bit differently.
        torch.testing.assert_close(end, straight, rtol=1e-6 * (before + after != 2), atol=0)
    assert differences(stored(tmp_path / "run" / "step-00000005"), end) == []


def test_what_is_frozen_is_written_once_and_referred_to_ever_after(tmp_path: Path) -> None:
    run_ranks(2, saving.saved, tmp_path, 3)
    (frozen,) = (tmp_path / "frozen").iterdir()
    written = {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    run_ranks(3, saving.resumed, tmp_path, 1)
    assert {path: path.stat().st_mtime_ns for path in frozen.rglob("*")} == written
    for step in (3, 4):
        folder = tmp_path / folders.step_name(step)
        meta = folders.read_valid_meta(folder)
        assert meta is not None and meta["frozen"] == frozen.name
        assert not [name for name in dcp.tensor_names(folder / "weights") if name.startswith("model.1.")]
    assert dcp.tensor_names(frozen) == {"model.1.weight", "model.1.bias"}


def test_other_frozen_weights_are_stored_beside_the_former_ones(tmp_path: Path) -> None:
    run_ranks(1, saving.saved, tmp_path, 3)
    run_ranks(1, partial(saving.saved, seed=5), tmp_path, 4)
    assert len(names(tmp_path / "frozen")) == 2
    for step in (3, 4):
        assert verify.find_damage(tmp_path / folders.step_name(step)) is None


def test_weights_are_held_until_they_are_staged(tmp_path: Path) -> None:
    assert run_ranks(1, saving.slow_staging, tmp_path)[0].value == (False, True)


def test_saves_never_overlap(tmp_path: Path) -> None:
    for outcome in run_ranks(2, saving.one_at_a_time, tmp_path):
        assert outcome.value == (1, [folders.step_name(step) for step in (1, 2, 3)])
    assert "still being written: training waits" in outcome.err


@pytest.mark.parametrize("save_async", [True, False])
@pytest.mark.parametrize(("where", "rank"), [("begin", 0), ("write", 0), ("write", 1), ("checksum", 1), ("commit", 0)])
def test_a_save_that_fails_on_one_rank_is_told_and_tried_again(
    tmp_path: Path, where: str, rank: int, save_async: bool
) -> None:
    outcomes = run_ranks(2, saving.failing, tmp_path, where, rank, [8], 12, save_async)
    for outcome in outcomes:
        # A save every 4 steps, and one step after a failed one.
        assert outcome.value["begun"] == [4, 8, 9, 12]
        assert outcome.value["there"] == [folders.step_name(step) for step in (4, 9, 12)]
        assert outcome.value["stopped"] is None
    assert "the checkpoint of step 8 failed" in outcomes[0].err
    assert "No space left on device" in outcomes[0].err
    assert verify.find_damage(tmp_path / "step-00000009") is None


def test_after_ranks_have_lost_each_other_in_a_save_they_meet_again(tmp_path: Path) -> None:
    """One rank fails without a message, and the other waits for it until the timeout."""
    for outcome in run_ranks(2, saving.failing, tmp_path, "time", 1, [8], 12, False):
        assert outcome.value["begun"] == [4, 8, 9, 12]
        assert outcome.value["there"] == [folders.step_name(step) for step in (4, 9, 12)]


def test_training_stops_before_more_than_an_interval_is_at_stake(tmp_path: Path) -> None:
    outcomes = run_ranks(2, saving.failing, tmp_path, "write", 1, list(range(8, 99)), 99, True)
    for outcome in outcomes:
        assert outcome.value["begun"] == [4, 8, 9, 10, 11, 12]
        assert outcome.value["newest"] == "step-00000004"
        assert "no checkpoint could be written since step 8" in outcome.value["stopped"]
        assert "it goes on from step 4" in outcome.value["stopped"]


def test_storage_that_goes_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    """Nothing may be written to the missing folder: it may be a mount point on the local disk."""
    for outcome in run_ranks(2, saving.vanishing, tmp_path, "storage", 12):
        assert outcome.value == ([4, 8, 9, 10, 12], [folders.step_name(step) for step in (4, 10, 12)])
    assert all(verify.find_damage(folder) is None for folder in folders.list_steps(tmp_path / "checkpoints"))


def test_frozen_weights_that_were_removed_are_written_again(tmp_path: Path) -> None:
    for outcome in run_ranks(2, saving.vanishing, tmp_path, "frozen", 8):
        assert outcome.value == ([4, 8], ["step-00000004", "step-00000008"])
    assert all(verify.find_damage(folder) is None for folder in folders.list_steps(tmp_path / "checkpoints"))


def test_storage_that_hangs_ends_the_run_with_a_message(tmp_path: Path) -> None:
    for outcome in run_ranks(2, saving.storage_that_hangs, tmp_path):
        assert "the checkpoint of step 2 is not written after" in outcome.value
        assert "it goes on from step 1" in outcome.value


def test_nodes_that_share_no_storage_are_found_out_at_the_first_save(tmp_path: Path) -> None:
    for outcome in run_ranks(2, saving.wrong_storage, tmp_path):
        assert "run.root and train.checkpoints must lie on storage that all nodes share" in outcome.value
    assert not list((tmp_path / "0").glob("step-*"))


def flip(path: Path) -> None:
    """Flip one bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_flipped_bit_in_any_file_is_found_by_all_ranks_before_anything_is_loaded(tmp_path: Path, ranks: int) -> None:
    run_ranks(2, saving.saved, tmp_path / "a", 3)
    run_ranks(2, saving.resumed, tmp_path / "a", 1)
    newest = tmp_path / "a" / "step-00000004"
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert len(files) == 7  # meta.json, and two parts of a .metadata and two files of shards
    for number, path in enumerate(files):
        content = path.read_bytes()
        flip(path)
        outcomes = run_ranks(ranks, saving.chosen, tmp_path / "a")
        assert [o.value for o in outcomes] == [("step-00000003", None)] * ranks, path
        said = "meta.json is missing or torn" if path.name == "meta.json" else f"{path.name} is damaged"
        assert f"step-00000004 cannot be used: {said}" in outcomes[0].err.replace(f"{path.parent.name}/", ""), number
        newest.with_name("step-00000004.damaged").rename(newest)
        path.write_bytes(content)
    assert run_ranks(1, saving.chosen, tmp_path / "a")[0].value == ("step-00000004", None)


def test_damaged_frozen_weights_leave_nothing_to_resume_and_that_is_said(tmp_path: Path) -> None:
    """Every checkpoint refers to them, and the program must not start from the beginning by itself."""
    run_ranks(2, saving.saved, tmp_path, 3)
    (frozen,) = (tmp_path / "frozen").iterdir()
    flip(frozen / "__1_0.distcp")
    outcomes = run_ranks(2, saving.chosen, tmp_path)
    for outcome in outcomes:
        checkpoint, error = outcome.value
        assert checkpoint is None
        assert "none of its 1 checkpoints can be used" in error
        assert f"{frozen.name}/__1_0.distcp is damaged" in error
    assert (tmp_path / "step-00000003").is_dir()


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    (tmp_path / "step-00000004.tmp").mkdir()
    assert run_ranks(1, saving.chosen, tmp_path)[0].value == (None, None)
