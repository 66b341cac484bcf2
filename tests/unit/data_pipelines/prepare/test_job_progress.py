"""Progress of jobs and imports: a bar on a terminal, log lines elsewhere, both with rate, rejects and time left."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from data_pipelines.prepare import job_progress
from data_pipelines.prepare.job_progress import JobProgress


def test_a_terminal_shows_parts_rate_rejects_and_the_time_left() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    with JobProgress("out", 4, console, unit="parts") as progress:
        for _ in range(3):
            progress.advance(100, 7)
    assert "out" in text.getvalue() and "3/4" in text.getvalue() and "records/s, 21 rejected" in text.getvalue()


def test_a_log_has_a_line_in_an_interval(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 4.0, 11.0, 12.0, 30.0))
    monkeypatch.setattr(job_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level("INFO", logger=job_progress.__name__)
    with JobProgress("out", 4, Console(file=io.StringIO()), unit="parts") as progress:
        for _ in range(4):
            progress.advance(100, 1)
    assert caplog.messages == [
        "out: 2 of 4 parts, 18 records/s, 2 rejected, 11 s left",
        "out: 4 of 4 parts, 13 records/s, 4 rejected, 0 s left",
    ]
