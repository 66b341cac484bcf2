"""A W&B server that hangs, fails and floods in the middle of a run, and comes back: training never waits for it."""

import gzip
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emma_train.config.schema import TrackerConfig
from emma_train.monitor.make_trackers import make_trackers

wandb = pytest.importorskip("wandb")
STEP_S = 0.3
"""A step of the smallest recipe, on a CPU; emma-4b takes seconds."""
FLOOD = b"x" * 2**20
ENTITY = {"id": "e", "name": "team"}
PROJECT = {"id": "p", "name": "emma", "entity": ENTITY}
BUCKET = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "project": PROJECT, "historyLineCount": 0}
VIEWER = {"id": "v", "entity": "team", "username": "someone", "email": "", "flags": "{}", "teams": {"edges": []}}
ANSWERS = {
    "viewer": VIEWER,
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}
ANSWER = json.dumps({"data": ANSWERS}).encode()
"""Enough, as the answer to every request, for a run to start and to be kept."""


class Server(ThreadingHTTPServer):
    """Accepts everything like W&B's server, unless its mode is another."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "works"
        self.changed = threading.Condition()
        self.met: list[str] = []
        """The mode that each request met."""
        self.steps: set[int] = set()
        """Of the rows of the history that have arrived."""

    def change(self, mode: str) -> None:
        with self.changed:
            self.mode = mode
            self.changed.notify_all()

    def wait_for(self, mode: str) -> bool:
        """Wait until a request has met a mode: W&B waits for longer and longer between the attempts that fail."""
        end = time.monotonic() + 120
        while mode not in self.met and time.monotonic() < end:
            time.sleep(0.02)
        return mode in self.met


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode = self.server.mode
        self.server.met.append(mode)
        with suppress(OSError):  # the client may give up
            if mode == "hangs":
                with self.server.changed:
                    self.server.changed.wait_for(lambda: self.server.mode != "hangs", timeout=60)
                self.close_connection = True
                return
            answer = ANSWER if mode == "works" else FLOOD
            self.send_response(500 if mode == "fails" else 200)
            self.send_header("Content-Length", str(len(answer) * (64 if mode == "floods" else 1)))
            self.end_headers()
            for _ in range(64 if mode == "floods" else 1):
                self.wfile.write(answer)
        if mode == "works" and "file_stream" in self.path:
            self.note(body)

    do_GET = do_PUT = do_POST

    def note(self, body: bytes) -> None:
        """Keep the steps of the history in a request of the file stream."""
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server.steps |= {json.loads(row)["step"] for row in rows}

    def log_message(self, *_: object) -> None:
        """Keep the output of tests clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    wandb.teardown()  # its service keeps the first server's address for as long as it lives
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield server
    wandb.teardown()
    server.change("works")
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_server_that_hangs_fails_floods_and_comes_back_costs_no_time(server: Server, tmp_path: Path) -> None:
    trackers = make_trackers(TrackerConfig(kind=["wandb"]), tmp_path, {})
    assert trackers.run_id
    calls_s, step = [], 0
    for mode in ("works", "hangs", "works", "fails", "floods", "works"):
        server.change(mode)
        server.met.clear()
        for _ in range(100):
            step += 1
            before = trackers.seconds
            trackers.log(step, {"loss": 1.0 / step, "lr": 1e-3, **{f"metric/{number}": 0.5 for number in range(40)}})
            calls_s.append(trackers.seconds - before)
        assert server.wait_for(mode), f"no request met a server that {mode}"
    # A busy machine interrupts some calls, and the first one of a run takes longer.
    assert statistics.median(calls_s) < 0.01 * STEP_S
    assert sum(calls_s) < 0.01 * STEP_S * step + 2.0, "a call has waited for the server"
    trackers.finish(0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
    assert server.steps == set(range(1, step + 1)), "rows of the history that were never sent"
