"""Checkpoints of several ranks in an object store keep the promises of a folder, without its rename."""

from pathlib import Path

import pytest
import torch

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.storage.paths import StoragePath, parse_path
from tests.distributed import saving
from tests.distributed.spawn import run_ranks
from tests.distributed.test_saving import flip, names
from tests.object_stores import url_of
from tests.runs import differences, stored


@pytest.fixture
def root(tmp_path: Path) -> StoragePath:
    return parse_path(url_of(tmp_path / "bucket" / "run"))


def test_a_store_holds_what_a_folder_would(root: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (root, tmp_path / "folder"):
        outcomes = run_ranks(2, saving.saved, folder, 3)
        newest = folder / "step-00000003"
        assert verify.find_damage(newest) is None
        assert differences(stored(newest), outcomes[0].value) == []
    files = [(folders.read_meta(folder / "step-00000003") or {})["files"] for folder in (root, tmp_path / "folder")]
    shards = [{name: entry for name, entry in listed.items() if ".distcp" in name} for listed in files]
    assert shards[0] == shards[1] and len(shards[0]) == 4
    assert names(tmp_path / "bucket" / "run") == ["frozen", "latest", "step-00000003"]
    monkeypatch.setattr(dcp, "FETCH_BYTES", 1)  # each tensor alone
    assert differences(stored(root / "step-00000003"), outcomes[0].value) == []


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3)])
def test_any_number_of_ranks_goes_on_from_a_store_as_one_would(
    root: StoragePath, tmp_path: Path, before: int, after: int
) -> None:
    straight = run_ranks(1, saving.saved, tmp_path / "straight", 5)[0].value
    run_ranks(before, saving.saved, root, 3)
    (frozen,) = (tmp_path / "bucket" / "run" / "frozen").iterdir()
    written = {path: path.stat().st_mtime_ns for path in frozen.rglob("*")}
    at_three = stored(root / "step-00000003")
    for outcome in run_ranks(after, saving.resumed, root, 2):
        loaded, end = outcome.value
        assert differences(loaded, at_three) == []
        torch.testing.assert_close(end, straight, rtol=1e-6, atol=0)
    assert differences(stored(root / "step-00000005"), end) == []
    assert {path: path.stat().st_mtime_ns for path in frozen.rglob("*")} == written
    assert dcp.tensor_names(root / "frozen" / frozen.name) == {"model.1.weight", "model.1.bias"}


def test_a_flipped_bit_in_any_file_of_a_store_is_found(root: StoragePath, tmp_path: Path) -> None:
    run_ranks(2, saving.saved, root, 3)
    run_ranks(2, saving.resumed, root, 1)
    newest = tmp_path / "bucket" / "run" / "step-00000004"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) == 7  # meta.json, and two parts of a .metadata and two files of shards
    for path in files:
        content = path.read_bytes()
        flip(path)
        outcomes = run_ranks(2, saving.chosen, root)
        assert [o.value for o in outcomes] == [("step-00000003", None)] * 2, path
        assert "step-00000004: set aside as meta.json.damaged" in outcomes[0].err
        path = path.with_name("meta.json.damaged") if path.name == "meta.json" else path
        path.write_bytes(content)
        (newest / "meta.json.damaged").rename(newest / "meta.json")
    assert run_ranks(1, saving.chosen, root)[0].value == ("step-00000004", None)


@pytest.mark.parametrize(("kind", "rank"), [("part", 1), ("put", 0), ("put", 1), ("get", 1), ("delete", 0)])
def test_a_store_that_fails_in_a_save_is_told_without_its_words_and_tried_again(
    root: StoragePath, kind: str, rank: int
) -> None:
    outcomes = run_ranks(2, saving.refused, root, kind, rank, [8], 12)
    for outcome in outcomes:
        begun, saved_steps, stopped = outcome.value
        assert begun == [4, 8, 9, 12] and stopped is None
        assert saved_steps == [folders.step_name(step) for step in (4, 9, 12)]
    (line,) = [line for line in outcomes[0].err.splitlines() if "the checkpoint of step 8 failed" in line]
    assert (
        "step-00000008" in line
        and "the object store fails (ConnectionError)" in line
        and "secret" not in outcomes[0].err
    )
    assert all(verify.find_damage(folder) is None for folder in folders.list_steps(root))


def test_a_store_that_goes_on_failing_stops_the_run(root: StoragePath) -> None:
    for outcome in run_ranks(2, saving.refused, root, "put", 1, list(range(8, 99)), 99):
        begun, saved_steps, stopped = outcome.value
        assert begun == [4, 8, 9, 10, 11, 12] and saved_steps == ["step-00000004"]
        assert "no checkpoint could be written since step 8" in stopped and "it goes on from step 4" in stopped


@pytest.mark.parametrize("kind", ["get", "head"])
def test_a_store_that_fails_while_it_is_loaded_from_ends_all_ranks_with_one_line(root: StoragePath, kind: str) -> None:
    run_ranks(2, saving.saved, root, 3)
    for outcome in run_ranks(2, saving.refused_loading, root, kind, 1):
        assert outcome.value.startswith(f"{root}/step-00000003/") and outcome.value.endswith("fails (ConnectionError)")


def test_a_kill_at_any_change_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    last = run_ranks(1, saving.killed, parse_path(url_of(tmp_path / "whole")), 0)[0].value
    ends = run_ranks(1, saving.saved, tmp_path / "straight", 8)[0].value
    assert last > 15
    newest_at = set()
    for number in range(1, last + 1, 3):
        root = parse_path(url_of(tmp_path / str(number)))
        with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
            run_ranks(1, saving.killed, root, number)
        newest = folders.newest_checkpoint(root)
        assert newest is not None and verify.find_damage(newest) is None
        step = int(newest.name.removeprefix("step-"))
        newest_at.add(step)
        _, end = run_ranks(1, saving.resumed, root, 8 - step)[0].value
        assert differences(end, ends) == []
    assert newest_at == {3, 6}
