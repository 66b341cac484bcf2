"""The samples of a step that fails at every start, for the last line of a job."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 120
NUM_SHOWN = 32


def repeated_step(run: Path) -> str:
    """The end of a sentence that names the samples of the step after the last one; empty where they are unknown."""
    command = [sys.executable, "-m", "emma_train", "status", str(run), "--next-samples"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return describe_steps(done.stdout.splitlines(), run) if done.returncode == 0 else ""


def describe_steps(lines: Sequence[str], run: Path) -> str:
    """The same for lines `step 5: KEY KEY …`: of one step the keys, of several that are logged together a command."""
    if not lines:
        return ""
    (first, _, keys), last = lines[0].partition(": "), lines[-1].partition(": ")[0]
    if len(lines) > 1:
        return f"; {first} to {last}: `emma-train status {run} --next-samples` has their samples"
    names = keys.split()
    more = f" and {len(names) - NUM_SHOWN} more" if names[NUM_SHOWN:] else ""
    return f"; samples of {first}: {' '.join(names[:NUM_SHOWN])}{more}"
