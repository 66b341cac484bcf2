"""The ledger of time: closed forms of hand-made run folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from emma_train.cli import main
from emma_train.monitor.goodput import CAUSES, LEDGER_FILE, ledger_of, read_ledger


def start(begun: float, ready: float, step: int) -> dict[str, Any]:
    return {"begun_unix": begun, "time_unix": ready, "step": step}


def line(time_unix: float, step: int, /, **seconds: float) -> dict[str, Any]:
    return {"time_unix": time_unix, "step": step, **{f"{name}_s": value for name, value in seconds.items()}}


TWICE_KILLED = [
    start(1000, 1010, 0),
    line(1016, 1, step=5, data_wait=1),  # 4 s more than the other steps take
    line(1026, 11, step=10),
    line(1040, 21, step=10, checkpoint=2, validation=1, samples=0.5),  # 0.5 s of nothing that is measured
    # killed at 1043, saved at step 15
    start(1060, 1065, 15),
    line(1067, 16, step=2),
    line(1073, 21, step=5, data_wait=1),
    # killed at 1099 before it saved anything, so that steps 16 to 21 are computed for a third time
    start(1100, 1104, 15),
    line(1106, 16, step=2),
    line(1110, 20, step=4),
    line(1111, 20, checkpoint=1),  # it stops with a last save
]
EXPECTED = {
    "steps": 1 + 10 + 4 + 1 + 4,  # steps 1 to 15 of the first start, 16 to 20 of the third
    "repeated": 6 + 6,  # 16 to 21 of the first start, 16 to 21 of the second
    "first_step": 4 + 1 + 1,
    "data_wait": 2,
    "checkpoint": 3,
    "validation": 1,
    "samples": 0.5,
    "start": 10 + 5 + 4,
    "restart": 20 + 27,
    "other": 0.5,
}


def test_two_kills_add_up_to_the_wall_time(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in TWICE_KILLED))
    ledger = read_ledger(tmp_path)
    assert ledger is not None and list(ledger.seconds) == list(CAUSES)
    assert ledger.seconds == pytest.approx(EXPECTED)
    assert ledger.wall_s == pytest.approx(1111 - 1000)
    assert (ledger.num_starts, ledger.begun_unix) == (3, 1000)
    assert ledger.goodput == pytest.approx(20 / 111)


def test_after_every_line_the_sum_is_the_wall_time() -> None:
    """Whenever one looks, and whenever a process is killed."""
    for end in range(1, len(TWICE_KILLED) + 1):
        ledger = ledger_of(TWICE_KILLED[:end])
        assert ledger is not None
        assert ledger.wall_s == pytest.approx(TWICE_KILLED[end - 1]["time_unix"] - 1000)


def test_a_step_that_was_not_done_was_lost() -> None:
    ledger = ledger_of([start(0, 0, 0), line(2, 1, step=2), line(4, 2, step=2), line(7, 2, step=3)])
    assert ledger is not None
    assert (ledger.seconds["steps"], ledger.seconds["repeated"]) == (4, 3)


def test_half_of_a_line_may_be_repeated() -> None:
    ledger = ledger_of([start(0, 0, 0), line(10, 10, step=10), start(10, 10, 4), line(16, 10, step=6)])
    assert ledger is not None
    assert (ledger.seconds["steps"], ledger.seconds["repeated"]) == (10, 6)


def test_no_ledger(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) is None
    assert ledger_of([]) is None
    assert ledger_of([line(5, 1, step=1), {"begun_unix": 1}, {"time_unix": None, "step": 3}]) is None
    ledger = ledger_of([start(0, 3, 0)])
    assert ledger is not None and ledger.seconds["start"] == ledger.wall_s == 3
    empty = ledger_of([start(3, 3, 0)])
    assert empty is not None and empty.goodput == 0.0


def test_a_rewind_starts_again_in_a_process_that_began_long_before() -> None:
    ledger = ledger_of([start(0, 10, 0), line(30, 20, step=20), start(0, 34, 12), line(42, 20, step=8)])
    assert ledger is not None
    assert (ledger.seconds["start"], ledger.seconds["restart"]) == (10 + 4, 0)
    assert (ledger.seconds["steps"], ledger.seconds["repeated"]) == (12 + 8, 8)
    assert ledger.wall_s == 42


def test_a_clock_that_is_behind_takes_no_time_away() -> None:
    ledger = ledger_of([start(0, 1, 0), line(3, 1, step=2), start(2, 4, 1), line(5, 2, step=1)])
    assert ledger is not None
    assert ledger.seconds["restart"] == 0.0
    assert min(ledger.seconds.values()) >= 0.0


@pytest.mark.parametrize("torn", ['{"time_unix": 1200, "st', "\x00\x00", "[1]\n"])
def test_torn_lines_are_left_out(tmp_path: Path, torn: str) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in TWICE_KILLED)
    (tmp_path / LEDGER_FILE).write_text(text + torn)
    ledger = read_ledger(tmp_path)
    assert ledger is not None and ledger.seconds == pytest.approx(EXPECTED)


def test_status_has_a_line_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "stage1"
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 20}\n")
    (run / LEDGER_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in TWICE_KILLED))
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stage1: goodput 18.0% of 1:51, restart 42.3%, start and load 17.1%, steps computed again 10.8%, "
        "compile and first step 5.4%, checkpoint stall 2.7%, data wait 1.8%, validation 0.9%, sample images 0.5%, "
        "other 0.5%"
    )
