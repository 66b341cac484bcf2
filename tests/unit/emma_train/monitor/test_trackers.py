"""metrics.jsonl across restarts, wandb offline, and trackers that fail."""

import json
import logging
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emma_train.errors import UserError
from emma_train.monitor.trackers import JsonlTracker, Trackers, WandbTracker, make_trackers, read_jsonl


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

    def images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
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
            trackers.images(step, "samples", [], [])
            trackers.alert("forgetting", "understanding falls")
        trackers.finish(0)
    assert len(lines(tmp_path / "m.jsonl")) == 3
    assert sorted(r.message.split(":")[1].split()[0] for r in caplog.records) == ["alert", "finish", "images", "log"]
    assert trackers.run_id == "abc"


def test_wandb_that_raises_at_every_call_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(**_: Any) -> None:
        raise wandb.errors.UsageError("no key")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        trackers = make_trackers("wandb", tmp_path, {}, run_id="kept")
        trackers.log(1, {"loss": 1.0})
        trackers.images(1, "samples", [tmp_path / "no.png"], ["no"])
        trackers.finish(1)
    assert len(caplog.records) == 1 and "wandb: start failed" in caplog.text
    assert trackers.run_id == "kept"
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.seconds
def test_wandb_runs_offline_and_holds_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(image)
    first = WandbTracker(tmp_path, "emma", "stage1", {"train": {"steps": 2}}, group="demo")
    assert first.run_id
    first.log(1, {"loss": 2.0, "data/digest": "ab"})
    first.images(1, "samples", [image], ["a red square"])
    first.alert("understanding is being forgotten", "step 1: right answers fell")
    first.finish(0)
    time.sleep(1.1)  # W&B names an offline folder by the second
    again = WandbTracker(tmp_path, "emma", "stage1", {}, run_id=first.run_id)
    again.log(2, {"loss": 1.5})
    again.finish(0)

    assert again.run_id == first.run_id
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and all(f.name == f"run-{first.run_id}.wandb" for f in files)
    deadline = time.monotonic() + 20
    records: list[Any] = []
    while sum(r.HasField("exit") for r in records) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process may still be writing
        records = [record for file in files for record in wandb_records(file)]
    runs = [r.run for r in records if r.HasField("run")]
    assert (runs[0].project, runs[0].run_group, runs[0].display_name) == ("emma", "demo", "stage1")
    rows = [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert {"step": 1, "loss": 2.0, "data/digest": "ab"}.items() <= rows[0].items()
    assert any("samples" in key for key in rows[1])
    assert any({"step": 2, "loss": 1.5}.items() <= row.items() for row in rows)
    (alert,) = [r.alert for r in records if r.HasField("alert")]
    assert (alert.title, alert.level) == ("understanding is being forgotten", "WARN")
    metrics = [r.metric for r in records if r.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)


def wandb_records(path: Path) -> list[Any]:
    """Reads a .wandb file: a 7-byte header, then a LevelDB log of 32 KiB blocks with protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, partial, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        partial += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(partial)
            records.append(record)
            partial = b""
    return records


def test_an_unknown_kind_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracker.kind: 'tensorboard'"):
        make_trackers("tensorboard", tmp_path, {})
