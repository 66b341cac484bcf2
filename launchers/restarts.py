"""Whether a job that ended starts again: a pure rule, and the file that counts a job's starts.

The batch script calls `python -m launchers.restarts` after each start and does what it prints: end, requeue or restart.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

STARTS_WITHOUT_STEP = 3
"""So many starts in a row without a new step end a job."""
TAIL_BYTES = 65_536
"""Of metrics.jsonl: more than its last complete line."""
Decision = Literal["end", "requeue", "restart"]


@dataclass(frozen=True)
class Starts:
    """What is known of the starts of a job."""

    steps: int = 0
    """Steps that were done after the best start, over all stages."""
    idle: int = 0
    """Starts in a row without a new step."""
    restarts: int = 0
    """Starts again after a process died, since the job last came out of the queue."""


def next_start(
    before: Starts, *, code: int, stopped: bool, running: bool, steps: int, max_restarts: int
) -> tuple[Decision, str, Starts]:
    """What follows a start: the decision, its reason, and the starts as known now.

    code: exit code of the run. stopped: SLURM asked it to stop. running: the job was not cancelled. steps: done by now.
    """
    now = replace(before, steps=max(steps, before.steps), idle=0 if steps > before.steps else before.idle + 1)
    if code == 0:
        return "end", "done", now
    if not running:
        return "end", "the job was cancelled", now
    if code == 2 and not stopped:
        return "end", "the recipe or the options are wrong (exit code 2); see the line above", now
    if now.idle >= STARTS_WITHOUT_STEP:
        return "end", f"{now.idle} starts in a row made no new step (at step {now.steps}); see the log of each", now
    if code == 75 or stopped:
        return "requeue", f"stopped before the end (exit code {code})", replace(now, restarts=0)
    if now.restarts < max_restarts:
        now = replace(now, restarts=now.restarts + 1)
        return "restart", f"failed (exit code {code}); restart {now.restarts} of {max_restarts}", now
    return "end", f"failed (exit code {code})" + (f" after {max_restarts} restarts" if max_restarts else ""), now


def steps_done(run: Path) -> int:
    """Steps of all stages in a run folder, by their newest checkpoints and the last lines of their metrics."""
    return sum(max(_last_step(stage / "metrics.jsonl"), _saved_step(stage)) for stage in (run, *run.glob("*/")))


def _last_step(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line may be incomplete
    return 0


def _saved_step(stage: Path) -> int:
    latest = stage / "checkpoints" / "latest"
    match = re.fullmatch(r"step-(\d+)\s*", latest.read_text()) if latest.is_file() else None
    return int(match[1]) if match else 0


def _read(path: Path) -> Starts:
    try:
        return Starts(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Starts()


def main() -> int:
    """Print the decision on stdout and its reason on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--stopped", action="store_true")
    parser.add_argument("--running", action="store_true")
    given = parser.parse_args()
    decision, reason, now = next_start(
        _read(given.file),
        code=given.code,
        stopped=given.stopped,
        running=given.running,
        steps=steps_done(given.run),
        max_restarts=given.max_restarts,
    )
    given.file.write_text(json.dumps(asdict(now)) + "\n")
    sys.stderr.write(
        f"slurm: {reason}" + {"end": "", "requeue": ", back into the queue", "restart": ""}[decision] + "\n"
    )
    sys.stdout.write(decision + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
