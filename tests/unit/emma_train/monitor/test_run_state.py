"""What a run is doing, by its folder: every state, and folders that are torn."""

import json
import os
from pathlib import Path

import pytest

from emma_train.cli import main
from emma_train.monitor.run_state import GONE_AFTER_S, LOCK_FILE, STARTS_FILE, read_run_state
from emma_train.report.overview import state_of_all, world_sizes
from emma_train.training.run_lock import RunLock

NOW = 1_800_000_000.0


def write_run(folder: Path, step: int = 7, steps: int = 20, saved: int = 5) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")
    rows = [{"step": n, "loss": 1.0, "step_s": 2.0, "tokens_per_s": 900.0} for n in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if saved:
        (folder / "checkpoints" / "latest").write_text(f"step-{saved:08d}\n")
    return folder


def write_lock(
    folder: Path, age_s: float, text: str = '{"host": "n1", "pid": 12, "job": "34", "since": "today"}'
) -> None:
    (folder / LOCK_FILE).write_text(text)
    os.utime(folder / LOCK_FILE, (NOW - age_s, NOW - age_s))


def test_every_state(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert read_run_state(tmp_path / "new", NOW).state == "not started"
    run = write_run(tmp_path / "run")
    assert read_run_state(run, NOW).state == "stopped"
    write_lock(run, age_s=3)
    state = read_run_state(run, NOW)
    assert (state.state, state.step, state.steps, state.saved, state.left_s) == ("running", 7, 20, 5, 26.0)
    write_lock(run, age_s=GONE_AFTER_S + 1)
    assert read_run_state(run, NOW).state == "crashed"
    write_lock(run, age_s=3, text="")
    assert read_run_state(run, NOW).state == "stopped"
    assert read_run_state(write_run(tmp_path / "done", step=20), NOW).state == "done"
    assert read_run_state(write_run(tmp_path / "saved", step=19, saved=20), NOW).state == "done"


def test_a_lock_that_is_held_is_a_run_that_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with RunLock(run):
        assert read_run_state(run).state == "running"
        assert read_run_state(run).holder["pid"] == os.getpid()
    assert read_run_state(run).state == "stopped"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/latest", LOCK_FILE, STARTS_FILE])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b"\xff\xfe\x00"])
def test_damaged_files_are_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_bytes(content)
    state = read_run_state(run, NOW)
    assert state.state in ("stopped", "running", "crashed")
    assert state.step in (5, 7)


def test_status_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "stage0", step=20), write_run(tmp_path / "stage1")
    for run, sizes in ((first, [4]), (second, [4, 2, 2])):
        lines = [{"world_size": size, "commit": "0123", "step": 0} for size in sizes]
        (run / STARTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "stage0  done         20/20  loss 1  900 tokens/s",
        "stage1  stopped      7/20  loss 1  900 tokens/s  saved 5",
        "stage1: 3 starts; ranks of each: 4, 2, 2; commit 0123",
    ]
    states = [read_run_state(run, NOW) for run in (first, second)]
    assert state_of_all(states) == "stopped, stage1"
    assert world_sizes(states) == "4, 2 (4 starts)"
    assert (state_of_all(states[:1]), world_sizes(states[:1])) == ("done", "4")
    write_lock(second, age_s=0)
    os.utime(second / LOCK_FILE)
    assert main(["status", str(second)]) == 0
    assert "process 12 on n1, SLURM job 34 trains, since today" in capsys.readouterr().out


def test_status_of_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["status", str(folder)]) == 2
        assert "holds no run" in capsys.readouterr().err


def test_status_of_a_job_that_waits_says_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for time in ("20260101-000000", "20260102-000000"):
        folder = tmp_path / "mine" / "launches" / time
        folder.mkdir(parents=True)
        (folder / "launch.json").write_text(json.dumps({"time": time, "nodes": 2}))
    assert main(["status", str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert "mine  launched 20260102-000000 on 2 nodes, not training yet" in out
    assert str(tmp_path / "mine" / "logs") in out
