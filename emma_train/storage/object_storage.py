"""Storage in object stores, through fsspec. Credentials come from each provider's usual places.

fsspec's exists(), is_file(), is_dir() and glob() answer no where a request fails. What decides about a checkpoint must
not take an object store that fails for an empty one, so it asks with the methods here, which raise StorageError.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from upath import UPath

from emma_train.errors import UserError
from emma_train.storage.protocol import META
from emma_train.storage.storage_error import StorageError, store_errors
from emma_train.storage.urls import display_url, opening_errors


@dataclass(frozen=True)
class ObjectStorage:
    """Implements Storage[UPath] and ReadStorage[str], whose URLs may have a query."""

    timeout_s: float | None = None
    """Longest time that a read waits for one answer; None leaves it to fsspec's package."""
    can_rename = False

    def read(self, file: UPath | str) -> bytes:
        system, path = _locate(file)
        with store_errors(file):
            data: bytes = system.cat_file(path, **self._limit(system))
            return data

    def read_range(self, file: UPath | str, offset: int, size: int) -> bytes:
        system, path = _locate(file)
        with store_errors(file):
            data: bytes = system.cat_file(path, start=offset, end=offset + size, **self._limit(system))
        if len(data) < size:  # the connection broke, or the file is shorter
            raise _wrong_answer(file, f"{len(data)} of {size} bytes came")
        if len(data) > size:
            advice = "use another server, or copy the shards to a local folder"
            raise _wrong_answer(file, f"the server sends whole files where ranges are asked for; {advice}", True)
        return data

    def size(self, file: UPath | str) -> int:
        system, path = _locate(file)
        with store_errors(file):
            info = system.info(path, **self._limit(system))
        if info.get("size") is None:
            raise _wrong_answer(file, "the server does not tell its size", True)
        return int(info["size"])

    def _limit(self, system: Any) -> dict[str, float]:
        return {"timeout": self.timeout_s} if self.timeout_s is not None and system.async_impl else {}

    @contextmanager
    def open(self, file: UPath) -> Iterator[BinaryIO]:
        with store_errors(file), file.open("rb") as stream:
            yield stream

    @contextmanager
    def create(self, file: UPath) -> Iterator[BinaryIO]:
        with store_errors(file), file.open("wb") as stream:
            yield stream

    def write(self, file: UPath, content: bytes) -> None:
        with store_errors(file):
            file.fs.pipe_file(file.path, content)

    def exists(self, file: UPath) -> bool:
        try:
            with store_errors(file):
                return bool(file.fs.info(file.path)["type"] == "file")
        except FileNotFoundError:
            return False

    def listdir(self, folder: UPath) -> list[UPath]:
        try:
            with store_errors(folder):
                names = folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return []
        return [folder / name.rstrip("/").rpartition("/")[2] for name in names]

    def listed_sizes(self, folder: UPath) -> dict[str, int]:
        with store_errors(folder):
            files = folder.fs.find(folder.path, detail=True)
        return {path.removeprefix(f"{folder.path}/"): int(info["size"]) for path, info in files.items()}

    def has_folder(self, folder: UPath) -> bool:
        return self.exists(folder / META)

    def make_folder(self, folder: UPath, parents: bool = False) -> None:
        pass

    def unpublished(self, folder: UPath) -> UPath:
        return folder

    def start_folder(self, folder: UPath) -> UPath:
        self.remove(folder)
        return folder

    def publish(self, written: UPath, folder: UPath, meta: str) -> None:
        self.write(folder / META, meta.encode())

    def set_aside(self, folder: UPath) -> UPath:
        renamed = folder / f"{META}.damaged"
        with store_errors(folder):
            folder.fs.mv((folder / META).path, renamed.path)
        return renamed

    def remove(self, folder: UPath) -> None:
        for path, recursive in ((folder / META, False), (folder, True)):
            with contextlib.suppress(FileNotFoundError), store_errors(folder):
                folder.fs.rm(path.path, recursive=recursive)

    def discard(self, folder: UPath) -> None:
        with contextlib.suppress(StorageError):
            self.remove(folder)

    def download(self, folder: UPath, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(folder):
            folder.fs.get(folder.path, str(target), recursive=True)

    def check_writable(self, folder: UPath, probe: str) -> None:
        file, content = folder / probe, b"can this be written?"
        try:
            with store_errors(folder):
                folder.fs.pipe_file(file.path, content)
                answer = folder.fs.cat_file(file.path)
                folder.fs.rm_file(file.path)
        except FileNotFoundError:
            raise UserError(f"{folder}: there is no such bucket, or it cannot be written to") from None
        except StorageError as error:
            if error.permanent:
                raise UserError(str(error)) from None
            raise
        if answer != content:
            raise UserError(f"{folder}: a file that was written there is read back with other content")


def _locate(file: UPath | str) -> tuple[Any, str]:
    """fsspec's file system of a file, and the path in it. fsspec keeps one file system of a kind per process."""
    if isinstance(file, UPath):
        return file.fs, file.path
    with opening_errors(file):
        system, path = fsspec.core.url_to_fs(file)
        return system, path


def _wrong_answer(file: UPath | str, reason: str, permanent: bool = False) -> StorageError:
    return StorageError(f"{display_url(file)}: {reason}", reason, permanent=permanent)
