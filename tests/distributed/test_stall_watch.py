"""A step that takes too long: every rank says where it is, and the one that keeps the others waiting is named."""

from pathlib import Path

import pytest

from emma_train.engine.stall_watch import NO_STORE
from tests.distributed.collective_ranks import stall
from tests.distributed.spawn import run_ranks


def report(logs: Path) -> str:
    (path,) = logs.iterdir()
    assert path.name.startswith("hang-after-7-")
    return path.read_text()


def test_the_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    outcomes = run_ranks(3, stall, 1, "busy", tmp_path)
    title, busy, waiting, *rest = report(tmp_path).splitlines()
    assert title.startswith("no progress after step 7 for ")
    assert 2 <= int(title.split()[-2]) <= 4
    assert busy.startswith("rank 1: ")
    assert "waits" not in busy
    assert waiting.startswith("ranks 0, 2: waits in all-reduce, emma_train/engine/world.py:")
    assert [line for line in rest if line.startswith("rank ")] == ["rank 0 of 3", "rank 1 of 3", "rank 2 of 3"]
    assert "time.sleep(6)" in report(tmp_path)
    said = [line for outcome in outcomes for line in outcome.err.splitlines() if "no progress" in line]
    assert len(said) == 1
    assert f"{title}: {busy}; {waiting} (" in said[0]


@pytest.mark.slow
def test_a_rank_that_is_stopped_gives_no_answer(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):  # the sum ends in an error, and the stopped rank is killed
        run_ranks(3, stall, 2, "stopped", tmp_path, timeout_s=60)
    lines = report(tmp_path).splitlines()
    assert lines[1] == "rank 2: does not answer: stopped, dead or cut off"
    assert lines[2].startswith("ranks 0, 1: waits in all-reduce")


@pytest.mark.slow
def test_where_the_store_hangs_with_its_rank_the_others_report_what_they_know(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(3, stall, 0, "stopped", tmp_path, timeout_s=60, grace_s=1)
    reports = sorted(tmp_path.iterdir(), key=lambda path: path.name[-5])
    assert [path.name[-11:] for path in reports] == ["-rank-1.txt", "-rank-2.txt"]
    for rank, path in enumerate(reports, 1):
        title, stopped, waiting, *rest = path.read_text().splitlines()
        assert title.startswith("no progress after step 7 for ")
        assert stopped == f"rank 0: {NO_STORE}"
        assert waiting.startswith(f"rank {rank}: waits in all-reduce, emma_train/engine/world.py:")
        assert any("in all_reduce" in line for line in rest)
        assert f"{title}: {stopped}; {waiting} (" in str(failure.value)


def test_a_step_in_time_is_not_reported(tmp_path: Path) -> None:
    run_ranks(3, stall, 0, "late", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_rank_alone_reports_itself(tmp_path: Path) -> None:
    run_ranks(1, stall, 0, "busy", tmp_path)
    assert report(tmp_path).splitlines()[1].startswith("rank 0: ")
