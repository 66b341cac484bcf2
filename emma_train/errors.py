"""The errors that the command line tells in one line, never as a traceback, and what is checked of its arguments."""

import errno
import os
from collections.abc import Sequence

SHORTAGES = {
    errno.EMFILE: "this process has too many files open: raise `ulimit -n`, or lower data.workers or data.prefetch",
    errno.ENFILE: "this machine has too many files open: raise fs.file-max, or run less on it",
    errno.ENOMEM: "this machine or container has no memory left: give it more, or lower data.workers or data.prefetch",
    errno.ENOSPC: "no space is left on this disk: free some, or name a folder on another one",
    errno.EDQUOT: "the disk quota is used up: free some of it, or name a folder on another disk",
}
"""What a process may run out of, and what to do."""


class UserError(Exception):
    """Bad input, the user's to fix: says what is wrong, where (file, key, value) and what to do. Exit code 2."""


class RunError(Exception):
    """A run that cannot go on though its recipe is right: a worker died, samples are broken, storage is gone. Exit code
    1."""


class RankFailure(Exception):
    """Other ranks died, failed or hang: the message names them, and is empty where another rank prints it. Exit code
    1."""


def describe_shortage(error: BaseException) -> str | None:
    """What to do where an error says that a process ran out of memory, open files or disk; None for any other error."""
    if isinstance(error, MemoryError):
        return SHORTAGES[errno.ENOMEM]
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, RuntimeError):  # libraries in C++ give the text only
        number = next((known for known in SHORTAGES if os.strerror(known) in str(error)), None)
    if number is None or number not in SHORTAGES:
        return None
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return f"{file}: {SHORTAGES[number]}" if file and number in (errno.ENOSPC, errno.EDQUOT) else SHORTAGES[number]


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raise UserError where the value of a command-line option is not in [low, high]."""
    if not low <= value <= high:
        raise UserError(f"{option} is {value}; give a number from {low} to {high}")


def empty_argument(words: Sequence[str]) -> str | None:
    """The option that has an empty text, as where a variable of the shell is not set, or "an argument"; None where
    there is none. Prompts and the values of overrides (key=) may be empty."""
    option = ""
    for word in words:
        if word.startswith("--"):
            option, has_value, value = word.partition("=")
            if has_value and not value and option != "--prompt":
                return option
        elif not word and option != "--prompt":
            return option or "an argument"
    return None
