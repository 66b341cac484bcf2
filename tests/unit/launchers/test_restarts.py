"""Whether a job starts again: each way in which it ends, and the limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.restarts import STARTS_WITHOUT_STEP, Starts, next_start, steps_done

ENDS = {"code": 1, "stopped": False, "running": True, "steps": 10, "max_restarts": 3}


@pytest.mark.parametrize(
    ("end", "decision"),
    [
        ({"code": 0}, "end"),
        ({"code": 0, "stopped": True}, "end"),  # the stop came with the last step: no start for nothing
        ({"code": 2}, "end"),
        ({"code": 75}, "requeue"),
        ({"code": 75, "running": False}, "end"),  # cancelled by a person
        ({"code": 1, "stopped": True}, "requeue"),  # asked to stop, but could not save
        ({"code": 1}, "restart"),
        ({"code": 137}, "restart"),
        ({"code": 1, "max_restarts": 0}, "end"),
        ({"code": 1, "running": False}, "end"),
    ],
)
def test_what_follows_an_end(end: dict, decision: str) -> None:
    assert next_start(Starts(), **{**ENDS, **end})[0] == decision


def test_restarts_are_counted_from_one_wait_in_the_queue_to_the_next() -> None:
    starts, decisions = Starts(), []
    for steps in (10, 20, 30, 40):
        decision, reason, starts = next_start(starts, **{**ENDS, "steps": steps})
        decisions.append(decision)
    assert decisions == ["restart"] * 3 + ["end"]
    assert reason == "failed (exit code 1) after 3 restarts"
    assert starts.restarts == 3
    assert next_start(starts, **{**ENDS, "code": 75, "steps": 50})[2].restarts == 0


@pytest.mark.parametrize("code", [1, 75])
def test_three_starts_without_a_new_step_end_the_job(code: int) -> None:
    _, _, starts = next_start(Starts(), **{**ENDS, "code": code})
    assert (starts.steps, starts.idle) == (10, 0)
    for number in range(1, STARTS_WITHOUT_STEP + 1):
        decision, reason, starts = next_start(starts, **{**ENDS, "code": code, "max_restarts": 99})
        assert (decision == "end") == (number == STARTS_WITHOUT_STEP)
    assert reason == "3 starts in a row made no new step (at step 10); see the log of each"
    # Steps that run again are not new ones.
    assert next_start(Starts(steps=10, idle=1), **{**ENDS, "steps": 9})[2] == Starts(steps=10, idle=2, restarts=1)


def test_steps_of_all_stages_count(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    for stage, steps in (("stage0", 15), ("stage1", 7)):
        (tmp_path / stage / "checkpoints").mkdir(parents=True)
        lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1))
        (tmp_path / stage / "metrics.jsonl").write_text(lines + '{"step": 99')  # the last line is incomplete
    assert steps_done(tmp_path) == 22
    (tmp_path / "stage1" / "checkpoints" / "latest").write_text("step-00000009\n")
    assert steps_done(tmp_path) == 24


def test_the_command_prints_the_decision_and_keeps_count(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    words = ["--file", str(tmp_path / "starts.json"), "--run", str(tmp_path), "--max-restarts", "1", "--running"]

    def after(*more: str) -> tuple[str, str]:
        line = [sys.executable, "-m", "launchers.restarts", *words, *more]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return done.stdout.strip(), done.stderr.strip()

    assert after("--code", "1") == ("restart", "slurm: failed (exit code 1); restart 1 of 1")
    assert after("--code", "75", "--stopped") == (
        "requeue",
        "slurm: stopped before the end (exit code 75), back into the queue",
    )
    assert json.loads((tmp_path / "starts.json").read_text()) == {"steps": 3, "idle": 1, "restarts": 0}
    (tmp_path / "starts.json").write_text("damaged")
    assert after("--code", "0") == ("end", "slurm: done")
