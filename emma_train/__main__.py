"""python -m emma_train: the same as emma-train. Started by launchers/torchrun.py, it also leaves its exit code."""

import os
import sys
from pathlib import Path

from emma_train.cli import main


def leave_exit_code(code: int) -> None:
    """Write the code to a file in the folder $EMMA_EXIT_CODES: torchrun ends with 1 for every failure."""
    if folder := os.environ.get("EMMA_EXIT_CODES"):
        name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{os.environ.get('LOCAL_RANK', 0)}"
        Path(folder, name).write_text(str(code))


if __name__ == "__main__":
    exit_code = main()
    leave_exit_code(exit_code)
    sys.exit(exit_code)
