"""W&B: offline files read back, and servers that hang, fail or refuse."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from emma_train.config.schema import TrackerConfig
from emma_train.monitor import wandb_tracker
from emma_train.monitor.make_trackers import make_trackers
from emma_train.monitor.wandb_tracker import WandbTracker
from tests.wandb_file import history, wandb_runs

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def write_samples(folder: Path) -> Path:
    """What generate/samples.py writes: an image, an edit, an answer."""
    folder.mkdir(parents=True)
    for name in ("t2i-0", "it2i-0", "it2i-0.reference", "it2i-0.target", "i2t-0.reference"):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
    listed = [
        {"task": "t2i", "prompt": "a red square", "file": "t2i-0.png"},
        {"task": "it2i", "prompt": "make it blue", "file": "it2i-0.png", "reference": "it2i-0.reference.png",
         "target": "it2i-0.target.png"},
        {"task": "i2t", "prompt": "what?", "reference": "i2t-0.reference.png", "answer": "red", "truth": "a square"},
    ]  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(listed))
    return folder


def tracker(folder: Path, run_id: str | None = None, **settings: object) -> WandbTracker:
    return WandbTracker(folder, "stage1", {"train": {"steps": 2}}, TrackerConfig(**settings), run_id)


@pytest.mark.seconds
def test_an_offline_run_holds_what_was_logged(tmp_path: Path) -> None:
    first = tracker(tmp_path, group="demo", entity="team", tags=["muon"], notes="a try")
    first.log(1, {"loss": 2.0, "data/digest": "ab"})
    first.samples(1, write_samples(tmp_path / "samples"))
    first.log(2, {"loss": 1.9})
    first.alert("the loss is far above what it was", "step 2: loss 9")
    first.finish(0)
    time.sleep(1.1)  # W&B names an offline folder by the second
    again = tracker(tmp_path, run_id=first.run_id)
    again.log(2, {"loss": 1.5})
    again.finish(0)
    assert again.run_id == first.run_id

    records = wandb_runs(tmp_path, ended=2)
    runs = [r.run for r in records if r.HasField("run")]
    assert {run.run_id for run in runs} == {first.run_id}
    run = runs[0]
    assert (run.entity, run.project, run.run_group, run.display_name) == ("team", "emma", "demo", "stage1")
    assert (list(run.tags), run.notes) == (["muon"], "a try")
    rows = history(records)
    assert [row["step"] for row in rows] == [
        1,
        1,
        2,
        2,
    ]  # a row for each step, and one for samples where there are some
    assert {"step": 1, "loss": 2.0, "data/digest": "ab"}.items() <= rows[0].items()
    samples = json.dumps(rows[1])
    assert "a red square" in samples
    assert "make it blue" in samples
    (alert,) = [r.alert for r in records if r.HasField("alert")]
    assert (alert.title, alert.level) == ("the loss is far above what it was", "WARN")
    metrics = [r.metric for r in records if r.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)

    (table_file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")
    table = json.loads(table_file.read_text())
    assert table["columns"] == list(wandb_tracker.COLUMNS)
    assert [[row[1], row[2], row[6], row[7]] for row in table["data"]] == [
        ["t2i", "a red square", None, None],
        ["it2i", "make it blue", None, None],
        ["i2t", "what?", "red", "a square"],
    ]
    shown = [[bool(cell) for cell in row[3:6]] for row in table["data"]]
    assert shown == [[False, True, False], [True, True, True], [True, False, False]]


def test_wandb_that_cannot_start_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> None:
        raise wandb.errors.UsageError("no key")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        trackers = make_trackers(TrackerConfig(kind=["wandb"]), tmp_path, {}, run_id="kept")
        trackers.log(1, {"loss": 1.0})
        trackers.samples(1, tmp_path / "none")
        trackers.finish(1)
    assert len(caplog.records) == 1
    assert "wandb: start failed" in caplog.text
    assert trackers.run_id == "kept"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


class Failing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Keep the output of tests clean."""


@pytest.fixture
def fresh_service() -> Iterator[None]:
    """W&B's service keeps the first server's address for as long as it lives."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture(params=["hangs", "fails", "refuses"])
def bad_server(request: pytest.FixtureRequest, fresh_service: None) -> Iterator[str]:
    """The URL of a server that accepts and never answers, that answers 500, or that is not there."""
    if request.param == "fails":
        server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if request.param == "refuses":
            listening.close()
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    bad_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training waits some seconds at the start and never again: 200 steps cost less than 1 % of 200 x 50 ms."""
    monkeypatch.setenv("WANDB_BASE_URL", bad_server)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_tracker, "START_TIMEOUT_S", 4.0)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        trackers = make_trackers(TrackerConfig(kind=["wandb"]), tmp_path, {})
    assert time.monotonic() - started < 30
    assert "this run is kept offline, send it with: wandb sync" in caplog.text
    for step in range(1, 201):
        trackers.log(step, {"loss": 1.0 / step, "lr": 1e-3})
    assert trackers.seconds < 0.01 * 200 * 0.05 * 10  # a busy machine; a call alone takes some 0.1 ms
    trackers.finish(0)
    rows = history(wandb_runs(tmp_path, ended=1))
    assert [row["step"] for row in rows] == list(range(1, 201))
