"""Local copies of remote shards, shared by the processes of a machine and limited in bytes.

A copy is renamed when it is complete, so readers never see a part of one. One process makes a copy while the others
wait for it. Where the limit would be exceeded, the copies that were read longest ago are removed.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from emma_train.errors import RunError, UserError

Source = Callable[[], tuple[int, Iterator[bytes]]]
"""Opens a remote file: its size, and its content in pieces."""


class LocalCache:
    """A folder of copies by name. A name identifies the content, so a copy is never out of date."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes. Raises UserError where the folder cannot be made."""
        self.folder = Path(folder)
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {self.folder}: cannot be made ({error.strerror})") from None

    def read(self, name: str, offset: int, size: int, source: Source) -> bytes:
        """`size` bytes of a copy, which is made first where it is missing; fewer where it ends before."""
        while True:
            try:
                # Opened for each read: a removed copy that is still open would keep its disk space.
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:
                self.make(name, source)
                continue
            try:
                os.utime(descriptor)  # time of the last read
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def drop(self, name: str) -> None:
        """Remove a copy. A process that is reading it can finish."""
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
                with self._room():  # a file that is renamed while the folder is listed may be missed
                    os.replace(part, path)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise RunError(f"data.cache_dir {self.folder}: cannot be written ({error.strerror})") from None
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _reserve(self, part: Path, size: int) -> None:
        """Create `part` at its full size, after making room for it."""
        if size > self.limit:
            raise UserError(
                f"data.cache_gib={self.limit / 2**30:g} holds less than one shard of {size / 2**30:.2f} GiB; raise it"
            )
        while not self._try_reserve(part, size):
            time.sleep(0.1)  # other processes are writing; their finished copies can be removed

    def _try_reserve(self, part: Path, size: int) -> bool:
        """Remove copies until there is room for `part`, and create it; False while there is no room."""
        with self._room():
            copies = [copy for copy in self._copies() if copy.path != part]
            free = self.limit - size - sum(copy.size for copy in copies)
            for copy in copies:
                if free < 0 and self._evict(copy.path):
                    free += copy.size
            if free < 0:
                return False
            with open(part, "wb") as file:
                file.truncate(size)
            return True

    def _room(self) -> FileLock:
        """Held while the copies are counted or change their names."""
        return FileLock(self.folder / "room.lock")

    def _copies(self) -> list["_Copy"]:
        """Every copy and every unfinished one, the one that was read longest ago first."""
        copies = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # other processes remove files meanwhile
                status = path.stat()
                if path.suffix != ".lock":
                    copies.append(_Copy(status.st_mtime_ns, status.st_size, path))
        return sorted(copies)

    def _evict(self, path: Path) -> bool:
        """Remove a copy, or an unfinished one whose process has died; False where it is being written."""
        if path.suffix == ".part":
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                return False
        path.unlink(missing_ok=True)
        return True


@dataclass(frozen=True, order=True)
class _Copy:
    last_read_ns: int
    size: int
    path: Path
