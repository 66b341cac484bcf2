"""metrics.jsonl across restarts, and trackers that fail."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from emma_train.monitor.trackers import JsonlTracker, Trackers, read_jsonl


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_step_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "run" / "metrics.jsonl")
    tracker.log(1, {"loss": 2.5, "stage": "stage1", "samples/t2i": 6})
    assert lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "stage": "stage1", "samples/t2i": 6}]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {k}, "loss": {k}.5}}\n' for k in range(1, 6)) + '{"step": 6, "lo')
    tracker = JsonlTracker(path, resume_step=3)
    tracker.log(4, {"loss": 9.0})
    tracker.finish(0)
    assert [(r["step"], r["loss"]) for r in lines(path)] == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 9.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_step_zero_starts_afresh_and_none_keeps_all_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    JsonlTracker(path).log(3, {})
    assert [r["step"] for r in lines(path)] == [1, 2, 3]
    JsonlTracker(path, resume_step=0).log(1, {})
    assert [r["step"] for r in lines(path)] == [1]


def test_values_that_are_not_finite_are_null_so_that_lines_are_strict_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]


def test_read_jsonl_leaves_out_what_is_not_an_object(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[1]\n\xff\xfe\n{"step": 2}\n{"step": 3')
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]


class Failing:
    run_id = "abc"

    def log(self, step: int, values: dict[str, float | int | str]) -> None:
        raise RuntimeError("disk on fire")

    def samples(self, step: int, folder: Path) -> None:
        raise RuntimeError("disk on fire")

    def alert(self, title: str, text: str) -> None:
        raise RuntimeError("disk on fire")

    def finish(self, exit_code: int) -> None:
        raise RuntimeError("disk on fire")


def test_a_failing_tracker_warns_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers([Failing(), JsonlTracker(tmp_path / "m.jsonl")])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            trackers.log(step, {"loss": 1.0})
            trackers.samples(step, tmp_path)
            trackers.alert("forgetting", "understanding falls")
        trackers.finish(0)
    assert len(lines(tmp_path / "m.jsonl")) == 3
    assert sorted(r.message.split(":")[1].split()[0] for r in caplog.records) == ["alert", "finish", "log", "samples"]
    assert trackers.run_id == "abc"
