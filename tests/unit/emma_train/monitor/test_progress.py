"""The progress line, on a terminal and off it."""

import io
import logging

import pytest
from rich.console import Console

from emma_train.monitor.console import log_handler
from emma_train.monitor.progress import Progress, duration, si


def test_off_a_terminal_it_logs_the_first_the_last_and_every_nth_step(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO())
    progress = Progress("stage1", 100, console=console, every_steps=40)
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            progress.update(step, {"loss": 1.25, "tokens_per_s": 12345.0} if step % 10 == 1 else None)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[2] for line in said] == ["1/100", "41/100", "81/100", "100/100"]
    assert all("stage1" in line and "loss 1.25" in line and "12.3k tokens/s" in line and "eta" in line for line in said)
    assert said[-1].endswith("eta 0:00")


def test_on_a_terminal_it_draws_one_line_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO):
        progress = Progress("stage2", 10, start_step=4, console=console)
        progress.update(10, {"loss": 0.5, "tokens_per_s": 7.0})
        progress.close()
    assert not caplog.records
    drawn = out.getvalue()
    assert "stage2" in drawn and "10/10" in drawn and "loss 0.5" in drawn and "7 tokens/s" in drawn


def test_log_lines_stand_above_the_bar_and_neither_overwrites_the_other() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    logger, handler = logging.getLogger("test_progress"), log_handler(console)
    handler.setFormatter(logging.Formatter("[0] %(message)s"))
    logger.addHandler(handler)
    try:
        progress = Progress("stage3", 4, console=console)
        progress.update(3)
        logger.warning("saved [bold]step[/bold] 3")
        progress.close()
    finally:
        logger.removeHandler(handler)
    before, after = out.getvalue().split("[0] saved [bold]step[/bold] 3", 1)
    assert before.endswith("\r\x1b[2K"), "the bar is erased before the line is printed"
    assert after.lstrip(" ").startswith("\n") and "3/4" in after, "the bar is drawn again below the line"


def test_time_before_a_resume_is_not_in_the_eta(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("emma_train.monitor.progress.time.monotonic", lambda: now[0])
    progress = Progress("s", 100, start_step=80, console=Console(file=io.StringIO()))
    now[0] += 10
    with caplog.at_level(logging.INFO):
        progress.update(90)
    assert caplog.records[0].getMessage().endswith("eta 0:10")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (float("nan"), "?"),
        (0.4, "0:00"),
        (42, "0:42"),
        (725, "12:05"),
        (11220, "3:07:00"),
        (183600, "2 d 03:00"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999.4, "999"), (999.9, "1k"), (12345, "12.3k"), (6.65e6, "6.65M")]
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text
