"""Exit codes of the processes of a node: torchrun ends with 1 for every failure, so each process
writes its exit code to a file."""

from collections.abc import Mapping
from pathlib import Path

EXIT_CODES_VARIABLE = "EMMA_EXIT_CODES"
"""A folder where each process of the trainer writes its exit code (emma_train/__main__.py)."""
FAILED, USAGE, STOPPED = 1, 2, 75


def node_exit_code(codes: Mapping[int, int], num_processes: int, stopped: bool) -> int:
    """Exit code of a node by those of its processes; a process that was killed has none.

    0 where all are done; 2 where one met a mistake of its user; 75 where all stopped as they were asked to; else 1.
    """
    known = [codes.get(rank, STOPPED if stopped else FAILED) for rank in range(num_processes)]
    if USAGE in known:
        return USAGE
    return next((code for code in known if code not in (0, STOPPED)), max(known, default=0))


def read_exit_codes(folder: Path) -> dict[int, int]:
    """Exit codes of the newest start, by local rank."""
    starts: dict[int, dict[int, int]] = {}
    for path in folder.iterdir():
        restart, rank = (int(part) for part in path.name.split("-"))
        starts.setdefault(restart, {})[rank] = int(path.read_text() or FAILED)
    return starts[max(starts)] if starts else {}
