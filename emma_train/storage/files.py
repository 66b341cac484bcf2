"""Files that a crash must not tear."""

import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old content or the new, never a part."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
