"""Local copies of remote shards, shared by the processes of a machine and bounded in bytes.

A copy appears whole (it is renamed when it is complete) and is made by one process while the others wait for it. Where
the limit would be passed, the copies that were read longest ago go.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from emma_train.errors import RunError, UserError

Source = Callable[[], tuple[int, Iterator[bytes]]]
"""Opens a remote file: its size, and its content in pieces."""


class Cache:
    """A folder of copies by name. A name tells the content, so a copy is never out of date."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes. Raises UserError where the folder cannot be."""
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {self.folder}: cannot be made ({error.strerror})") from None

    def read(self, name: str, offset: int, size: int, source: Source) -> bytes:
        """`size` bytes of a copy, which is made first where it is missing; fewer where it ends before."""
        while True:
            try:
                # Opened anew for each read: a copy that is gone but held open would still take its room.
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                self.make(name, source)
                continue
            try:
                os.utime(descriptor)  # when it was read last
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def drop(self, name: str) -> None:
        """Remove a copy; whoever reads it still can."""
        (self.folder / name).unlink(missing_ok=True)

    def make(self, name: str, source: Source) -> None:
        """Make a copy where it is missing. Raises RunError where it cannot be written, and what `source` raises."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        with FileLock(self.folder / f"{name}.lock"):
            if path.exists():
                return
            size, pieces = source()
            try:
                self._reserve(part, size)
                with open(part, "r+b") as file:
                    for piece in pieces:
                        file.write(piece)
                os.replace(part, path)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise RunError(f"data.cache_dir {self.folder}: cannot be written ({error.strerror})") from None
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _reserve(self, part: Path, size: int) -> None:
        """Make `part` at its full size, and room for it."""
        if size > self.limit:
            raise UserError(
                f"data.cache_gib={self.limit / 2**30:g} holds less than one shard of {size / 2**30:.2f} GiB; raise it"
            )
        while not self._room(part, size):
            time.sleep(0.1)  # others are writing; what they finish may go

    def _room(self, part: Path, size: int) -> bool:
        """Remove copies until there is room for `part`, and take it; False while there is none."""
        with FileLock(self.folder / "room.lock"):
            held = [copy for copy in self._held() if copy[2] != part]
            left = self.limit - size - sum(length for _, length, _ in held)
            for _, length, path in held:
                if left < 0 and self._evict(path):
                    left += length
            if left < 0:
                return False
            with open(part, "wb") as file:
                file.truncate(size)
            return True

    def _held(self) -> list[tuple[int, int, Path]]:
        """(last read, bytes, path) of every copy and every beginning of one, oldest first."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # others rename and drop meanwhile
                status = path.stat()
                if path.suffix != ".lock":
                    found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _evict(self, path: Path) -> bool:
        """Remove a copy, or what a process that died left of one; not what is being written."""
        if path.suffix == ".part":
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                return False
        path.unlink(missing_ok=True)
        return True
