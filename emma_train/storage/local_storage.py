"""Storage in local folders, network file systems included."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from emma_train.storage.files import write_atomic
from emma_train.storage.protocol import META
from emma_train.storage.storage_error import StorageError


class LocalStorage:
    """Implements Storage[Path] and ReadStorage[str]."""

    can_rename = True

    def read(self, file: Path | str) -> bytes:
        return Path(file).read_bytes()

    def read_range(self, file: Path | str, offset: int, size: int) -> bytes:
        path = str(file)
        try:
            return _read_range(path, offset, size)
        except OSError:
            _open_file.cache_clear()  # a file of a network file system may have become stale with its server
            raise

    def size(self, file: Path | str) -> int:
        return os.stat(file).st_size

    @contextmanager
    def open(self, file: Path) -> Iterator[BinaryIO]:
        with open(file, "rb") as stream:
            yield stream

    @contextmanager
    def create(self, file: Path) -> Iterator[BinaryIO]:
        with open(file, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def write(self, file: Path, content: bytes) -> None:
        write_atomic(file, content)

    def exists(self, file: Path) -> bool:
        return file.is_file()

    def listdir(self, folder: Path) -> list[Path]:
        return list(folder.glob("*"))

    def listed_sizes(self, folder: Path) -> dict[str, int]:
        return {}

    def has_folder(self, folder: Path) -> bool:
        return folder.is_dir()

    def make_folder(self, folder: Path, parents: bool = False) -> None:
        folder.mkdir(parents=parents, exist_ok=True)

    def unpublished(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.tmp")

    def start_folder(self, folder: Path) -> Path:
        written = self.unpublished(folder)
        if written.exists():
            shutil.rmtree(written)
        written.mkdir()
        return written

    def publish(self, written: Path, folder: Path, meta: str) -> None:
        write_atomic(written / META, meta)
        for path in (*(p for p in written.rglob("*") if p.is_dir()), written):
            _sync(path)
        former = _add_suffix(folder, ".removed") if folder.exists() else None
        os.replace(written, folder)
        _sync(folder.parent)
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)

    def set_aside(self, folder: Path) -> Path:
        return _add_suffix(folder, ".damaged")

    def remove(self, folder: Path) -> None:
        if folder.suffix:  # .tmp, .removed or .damaged: no name of a published folder
            shutil.rmtree(folder)
        else:
            shutil.rmtree(_add_suffix(folder, ".removed"), ignore_errors=True)

    def discard(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def download(self, folder: Path, target: Path) -> None:
        shutil.copytree(folder, target)

    def check_writable(self, folder: Path, probe: str) -> None:
        pass


def _add_suffix(folder: Path, suffix: str) -> Path:
    renamed = folder.with_name(folder.name + suffix)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(folder, renamed)
    return renamed


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk, where its file system can, so that a power cut does not lose them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _OpenFile:
    """An open file; it is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=256)
def _open_file(path: str) -> _OpenFile:
    return _OpenFile(path)


def _read_range(path: str, offset: int, size: int) -> bytes:
    file = _open_file(path)  # a name for it keeps it open should the cache drop it meanwhile
    data = os.pread(file.descriptor, size, offset)
    if len(data) == size:
        return data
    # One pread may return less than asked for (2 GiB at once, or a network file system); only the end returns nothing.
    pieces = [data]
    while (length := sum(map(len, pieces))) < size:
        pieces.append(os.pread(file.descriptor, size - length, offset + length))
        if not pieces[-1]:
            raise ends_early(path, length, size)
    return b"".join(pieces)


def ends_early(path: str, length: int, size: int) -> StorageError:
    """The error where a file ends within a range that should be in it."""
    reason = f"it ends within the record: {length} of {size} bytes"
    return StorageError(f"{path}: {reason}", reason, permanent=True)
