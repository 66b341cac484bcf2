"""Jobs run beside each other, but never two in one folder; what is stopped or fails is not finished."""

import sys
from pathlib import Path

import pytest

from emma_train.ablation import processes
from emma_train.ablation.processes import EXIT_STOPPED, TrialJob, run_all

WAIT = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
until = time.monotonic() + 30
while not Path("{other}").exists() and time.monotonic() < until:
    time.sleep(0.02)
sys.exit(not Path("{other}").exists())
"""
"""Says that it runs and waits until the other one does."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WAIT_S", 0.02)


def job(name: str, folder: Path, finished: list[str], *codes: str) -> TrialJob:
    """A job whose commands are Python, with `folder / name` as their argument."""
    commands = [[sys.executable, "-c", code, str(folder / name)] for code in codes]
    return TrialJob(name, folder, commands, folder / "log", lambda: finished.append(name))


def test_jobs_share_lanes_but_no_folder(tmp_path: Path) -> None:
    finished: list[str] = []
    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        folder.mkdir()
    meet_c, meet_a = (WAIT.replace("{other}", str(path)) for path in (other / "c", same / "a"))
    jobs = [
        job("a", same, finished, meet_c, f"open({str(same / 'done')!r}, 'w')"),
        job("b", same, finished, f"open({str(same / 'done')!r})"),
        job("c", other, finished, meet_a),
    ]
    assert run_all(jobs, [{}, {}], lambda: False) == ([], False)
    assert sorted(finished) == ["a", "b", "c"]


def test_a_failure_ends_its_job_alone(tmp_path: Path) -> None:
    finished: list[str] = []
    broken = job("broken", tmp_path, finished, "print('no such thing'); raise SystemExit(2)", "open('never', 'w')")
    good = job("good", tmp_path, finished, "print('one')", "print('two')")
    failures, stopped = run_all([broken, good], [{}], lambda: False)
    assert failures == ["broken failed (exit code 2): no such thing"]
    assert finished == ["good"] and not stopped
    assert (tmp_path / "log").read_text().split("\n")[-3:] == ["one", "two", ""]


def test_a_stop_is_passed_on_and_nothing_begins_after_it(tmp_path: Path) -> None:
    finished: list[str] = []
    begun = tmp_path / "a"
    saving = f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_STOPPED}));"
    saving += "open(sys.argv[1], 'w').close(); time.sleep(60)"
    jobs = [job("a", tmp_path, finished, saving), job("b", tmp_path, finished, "open(sys.argv[1], 'w')")]
    assert run_all(jobs, [{}], begun.exists) == ([], True)
    assert finished == [] and not (tmp_path / "b").exists()
