"""The clock of a start: what it writes is what was measured, and a failing disk stops nothing."""

import json
import logging
import time
from pathlib import Path

import pytest

from emma_train.monitor.goodput import LEDGER_FILE, read_ledger
from emma_train.training import time_ledger
from emma_train.training.time_ledger import TimeLedger


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.stall_s = 5000.0, 0.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def train(self, ledger: TimeLedger, steps: range, logged: int = 2) -> None:
        for step in steps:
            self.now += 0.5
            ledger.add("data_wait", 0.5)
            with ledger.measure("step"):
                self.now += 2.0 if step == steps[0] else 1.0
                if step % 3 == 0:  # a save is still copying
                    self.now += 0.25
                    self.stall_s += 0.25
            ledger.after_step(step, step % logged == 0)


def new_start(run: Path, step: int, clock: Clock, begun: float | None = None) -> TimeLedger:
    return TimeLedger(run, step, begun, lambda: clock.stall_s)


def test_a_killed_and_a_finished_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first = new_start(tmp_path, 0, clock, begun=clock.now - 10)
    clock.train(first, range(1, 8))
    goodput, wall_s = first.goodput(), clock.now - 4990
    assert goodput == pytest.approx(7 / wall_s)
    lines = (tmp_path / LEDGER_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 4, 6]  # step 7 is lost with the process
    with open(tmp_path / LEDGER_FILE, "a") as file:
        file.write('{"time_unix": 50')
    clock.now += 100

    second = new_start(tmp_path, 4, clock, begun=clock.now - 8)
    clock.train(second, range(5, 8))
    second.close()
    second.close()
    ledger = read_ledger(tmp_path)
    assert ledger is not None
    assert ledger.wall_s == pytest.approx(clock.now - 4990)
    assert ledger.seconds == pytest.approx(
        {
            "steps": 4 + 3,
            "repeated": 2,
            "first_step": 2,
            "data_wait": 3 + 1.5,
            "checkpoint": 0.5 + 0.25,
            "validation": 0,
            "samples": 0,
            "start": 10 + 8,
            "restart": 1.5 + 100 - 8,
            "other": 0,
        }
    )
    assert second.goodput() == pytest.approx(ledger.goodput)


def test_long_steps_are_written_without_being_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(time_ledger, "WRITE_EVERY_S", 4.0)
    clock.train(new_start(tmp_path, 0, clock), range(1, 11), logged=100)
    lines = (tmp_path / LEDGER_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 4, 7, 10]


def test_a_block_that_raises_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ledger = new_start(tmp_path, 0, clock)
    with pytest.raises(ValueError, match="no"), ledger.measure("validation"):
        clock.now += 5
        raise ValueError("no")
    ledger.close()
    assert len((tmp_path / LEDGER_FILE).read_text().splitlines()) == 1


def test_only_the_main_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ledger = TimeLedger(tmp_path, 0, None, lambda: 0.0, write=False)
    clock.train(ledger, range(1, 4))
    ledger.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = TimeLedger(tmp_path / "gone", 0, None, lambda: 0.0)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            with ledger.measure("step"):
                pass
            ledger.after_step(step, is_logged=True)
    failures = [record.message.split(" failed")[0] for record in caplog.records]
    assert failures == [f"{LEDGER_FILE}: start", f"{LEDGER_FILE}: write"]


def test_cost_of_a_step(tmp_path: Path) -> None:
    """Some 30 microseconds a logged step, 0.5 % of a step of 6 ms; the smallest stage takes 300."""
    ledger = TimeLedger(tmp_path, 0, None, lambda: 0.0)
    best = float("inf")
    for number in range(20):
        started = time.perf_counter()
        for step in range(100 * number, 100 * number + 100):
            ledger.add("data_wait", 0.0)
            with ledger.measure("step"):
                pass
            ledger.goodput()
            ledger.after_step(step, is_logged=True)
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 1.5e-3
