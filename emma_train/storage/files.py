"""Local files that are replaced at once: after a crash a file has its old content or its new, never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from emma_train.errors import UserError
from emma_train.storage.urls import check_local


def make_folder(path: Path) -> None:
    """Make a folder that the user named, with its parents. Raises UserError where nothing can be written into it."""
    check_local(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make this folder ({error.strerror}); name another one") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: cannot write into this folder (no permission); name another one")


def output_file(option: str, path: Path) -> Path:
    """The file that an option names; its folder is made. Raises UserError where it is a folder or cannot be written."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    make_folder(path.parent)
    return path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file; text is written as UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces the file `path` when the block ends without an error."""
    with replacing_path(path) as unfinished, open(unfinished, "wb") as file:
        yield file


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A path at which the block writes a file, which is then flushed to disk and replaces the file `path`."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)  # it may be a link, which writing would follow
    yield unfinished
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(unfinished, path)
