"""Progress bar and log lines on one terminal: a pseudo-terminal records what a process writes to it."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

WIDTH, NUM_STEPS = 100, 8
SCRIPT = f"""
import logging, sys
from emma_train.monitor.console import log_handler, stderr_console
from emma_train.monitor.progress import Progress

handler = log_handler(stderr_console()) if sys.argv[1] == "shared" else logging.StreamHandler()
logging.basicConfig(level=logging.INFO, format="%(asctime)s [0] %(message)s", datefmt="%H:%M:%S", handlers=[handler])
progress = Progress("stage1", {NUM_STEPS})
for step in range(1, {NUM_STEPS} + 1):
    progress.update(step, {{"loss": 1.0, "tokens_per_s": 1000.0}})
    logging.info("saved [step] %d", step)
progress.close()
logging.info("the end")
"""
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \[0\] (saved \[step\] \d|the end)")


def written(handler: str, on_terminal: bool) -> str:
    """What the script writes to stderr."""
    command = [sys.executable, "-c", SCRIPT, handler]
    environment = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "40", "TERM": "xterm"}
    if not on_terminal:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stderr
    main, terminal = pty.openpty()
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        parts = []
        while True:
            try:
                parts.append(os.read(main, 65536))
            except OSError:  # the process has closed its end
                break
            if not parts[-1]:
                break
    os.close(main)
    assert process.returncode == 0, b"".join(parts)
    return b"".join(parts).decode()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows; knows the few control sequences that rich uses."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
        elif token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
    return [line.rstrip() for line in lines]


def intact_log_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if LOG_LINE.fullmatch(line)]


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="needs pseudo-terminals")
def test_on_a_terminal_every_log_line_has_a_line_of_its_own() -> None:
    lines = screen(written("shared", on_terminal=True))
    assert len(intact_log_lines(lines)) == NUM_STEPS + 1
    assert sum("stage1" in line for line in lines) == 1, lines


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="needs pseudo-terminals")
def test_with_another_handler_lines_run_into_the_bar() -> None:
    lines = screen(written("plain", on_terminal=True))
    assert len(intact_log_lines(lines)) < NUM_STEPS + 1


def test_off_a_terminal_lines_are_plain() -> None:
    text = written("shared", on_terminal=False)
    assert "\x1b" not in text
    assert len(intact_log_lines(text.splitlines())) == NUM_STEPS + 1
