"""Local checkpoints of several ranks on several nodes: copies, lost nodes, damage, and other numbers of ranks."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.storage.paths import parse_path
from tests.distributed import local_saving
from tests.distributed.spawn import run_ranks
from tests.object_stores import url_of
from tests.runs import differences, stored


def part(root: Path, node: str, step: int) -> Path:
    """A node's part of a local checkpoint."""
    (run,) = (root / "nodes" / node).iterdir()
    return run / folders.step_name(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.distcp"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_every_node_keeps_its_files_and_those_of_the_node_before(tmp_path: Path) -> None:
    run_ranks(3, local_saving.saved, tmp_path, "abc", 0, [1, 2])
    for node, ranks in (("a", "02"), ("b", "01"), ("c", "12")):
        assert names(part(tmp_path, node, 2) / "weights") == [f"__{rank}_0.distcp" for rank in ranks]
        assert not part(tmp_path, node, 1).exists()  # the newest one is enough
    metas = [(part(tmp_path, node, 2) / "meta.json").read_bytes() for node in "abc"]
    assert metas[0] == metas[1] == metas[2]
    assert not folders.list_steps(tmp_path / "shared")


@pytest.mark.parametrize(
    ("before", "lost", "after"),
    [
        ("ab", "b", "ac"),
        pytest.param("aab", "", "abb", marks=pytest.mark.slow),
        pytest.param("abc", "b", "ac", marks=pytest.mark.slow),
    ],
)
def test_any_nodes_that_hold_all_files_go_on_from_it(tmp_path: Path, before: str, lost: str, after: str) -> None:
    saved = run_ranks(len(before), local_saving.saved, tmp_path, before, 2, [3])[0].value
    for node in lost:
        shutil.rmtree(tmp_path / "nodes" / node)
    outcomes = run_ranks(len(after), local_saving.resumed, tmp_path, after)
    for outcome in outcomes:
        name, content = outcome.value
        assert name == "step-00000003"
        assert differences(content, saved) == []
    checkpoint = tmp_path / "shared" / "step-00000003"
    assert verify.find_damage(checkpoint) is None
    assert differences(stored(checkpoint), saved) == []


@pytest.mark.slow
def test_shared_storage_may_be_an_object_store(tmp_path: Path) -> None:
    shared = parse_path(url_of(tmp_path / "bucket" / "run"))
    saved = run_ranks(2, partial(local_saving.saved, shared=shared), tmp_path, "ab", 2, [3])[0].value
    shutil.rmtree(tmp_path / "nodes" / "a")
    name, content = run_ranks(2, partial(local_saving.resumed, shared=shared), tmp_path, "cb")[0].value
    assert name == "step-00000003"
    assert differences(content, saved) == []
    assert verify.find_damage(shared / name) is None


def test_a_damaged_file_is_taken_from_the_copy_and_without_one_an_older_checkpoint(tmp_path: Path) -> None:
    saved = run_ranks(2, local_saving.saved, tmp_path, "ab", 2, [3])[0].value
    flip(part(tmp_path, "a", 3) / "optimizer" / "__0_0.distcp")
    outcomes = run_ranks(2, local_saving.resumed, tmp_path, "ab")
    assert outcomes[0].value[0] == "step-00000003"
    assert differences(outcomes[0].value[1], saved) == []
    assert "optimizer/__0_0.distcp on a is damaged" in outcomes[0].err

    shutil.rmtree(tmp_path / "shared" / "step-00000003")
    flip(part(tmp_path, "b", 3) / "optimizer" / "__0_0.distcp")
    outcomes = run_ranks(2, local_saving.resumed, tmp_path, "ab")
    assert [outcome.value[0] for outcome in outcomes] == ["step-00000002"] * 2
    assert "local checkpoint of step 3: optimizer/__0_0.distcp is damaged on every node" in outcomes[0].err
    assert [path.name for path in folders.list_steps(tmp_path / "shared")] == ["step-00000002"]


@pytest.mark.slow
def test_files_that_no_node_has_any_more_are_named(tmp_path: Path) -> None:
    run_ranks(3, local_saving.saved, tmp_path, "abc", 2, [3])
    # A step that a rewind skips is not taken either.
    assert run_ranks(1, local_saving.resumed, tmp_path, "a", 3)[0].value[0] == "step-00000002"
    for node in "ab":
        shutil.rmtree(tmp_path / "nodes" / node)
    outcome = run_ranks(1, local_saving.resumed, tmp_path, "c")[0]
    assert outcome.value[0] == "step-00000002"
    assert "local checkpoint of step 3: no node has optimizer/.metadata and 3 more files" in outcome.err


@pytest.mark.slow
def test_a_person_who_goes_back_is_not_brought_forward_again(tmp_path: Path) -> None:
    run_ranks(2, local_saving.saved, tmp_path, "ab", 2, [1, 3])
    shutil.move(tmp_path / "shared" / "step-00000002", tmp_path / "away")
    assert [outcome.value[0] for outcome in run_ranks(2, local_saving.resumed, tmp_path, "ab")] == [None, None]
    # Nor is a run that begins anew in the same folder.
    shutil.move(tmp_path / "away", tmp_path / "shared" / "step-00000002")
    (tmp_path / "shared" / "local-start").unlink()
    assert run_ranks(1, local_saving.resumed, tmp_path, "a")[0].value[0] == "step-00000002"


@pytest.mark.slow
def test_a_rank_that_does_not_answer_fails_one_local_save_and_training_goes_on(tmp_path: Path) -> None:
    for outcome in run_ranks(2, local_saving.late, tmp_path, 1):
        assert outcome.value == ([4], None)
        assert "the local checkpoint of step 2 failed" in outcome.err


@pytest.mark.slow
def test_a_node_that_dies_during_a_local_save_leaves_the_one_before_complete(tmp_path: Path) -> None:
    error, seconds = run_ranks(2, local_saving.killed, tmp_path, 1)[0].value
    assert error is not None and seconds < 10  # far below the timeout of 20 s
    shutil.rmtree(tmp_path / "nodes" / "b")
    assert run_ranks(1, local_saving.resumed, tmp_path, "a")[0].value[0] == "step-00000001"


def test_two_nodes_must_not_see_the_same_folder(tmp_path: Path) -> None:
    for outcome in run_ranks(2, local_saving.same_folder, tmp_path):
        assert outcome.value is not None and "see the same folder; name one of each node ({node})" in outcome.value


@pytest.mark.parametrize("full_rank", [None, 1])
def test_files_of_any_size_arrive_and_one_full_disk_stops_no_other_rank(tmp_path: Path, full_rank: int | None) -> None:
    sizes = [[0, 5000], [1, 1000, 999], []]
    outcomes = run_ranks(3, local_saving.exchanged, tmp_path, [1, 2, 0], sizes, 1000, full_rank)
    problems = [outcome.value for outcome in outcomes]
    assert [problem is not None for problem in problems] == [rank == full_rank for rank in range(3)]
    for rank, of_rank in enumerate(sizes):
        for number in range(len(of_rank)) if (rank + 1) % 3 != full_rank else ():
            name = f"weights/{rank}-{number}"
            sent, received = tmp_path / str(rank) / name, tmp_path / str((rank + 1) % 3) / name
            assert sent.read_bytes() == received.read_bytes()
