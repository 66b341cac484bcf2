"""Bytes of shards, by path or by URL: what fails for a moment is tried again, and remote files may be kept in a cache.

Waits between tries double, and each is varied at random so that a thousand readers do not return at the same time.
"""

import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from emma_train.config.schema import DataConfig
from emma_train.errors import RunError, UserError, describe_shortage
from emma_train.storage.local_cache import LocalCache
from emma_train.storage.local_storage import LocalStorage, ends_early
from emma_train.storage.object_storage import ObjectStorage
from emma_train.storage.protocol import ReadStorage
from emma_train.storage.storage_error import StorageError, as_storage_error
from emma_train.storage.urls import display_url, is_local, local_path

log = logging.getLogger(__name__)
Result = TypeVar("Result")
LONGEST_WAIT_S = 30.0
REQUEST_BYTES = 32 << 20
"""Bytes of one request where a complete file is fetched."""
AHEAD = 1 / 8
"""Largest part of the cache that is fetched ahead at once: three tasks each use one window and fetch the next."""


@dataclass(frozen=True)
class ShardReader:
    """Reads local and remote files. Stateless, so any process may read any file."""

    retries: int = 5
    """Further tries after a failure that may be temporary."""
    wait_s: float = 0.5
    """Wait before the first of them; each is twice as long as the one before."""
    timeout_s: float = 30.0
    """Longest time that one answer of an object store or server may take."""
    cache: LocalCache | None = None
    """Local copies of remote files; None reads ranges."""

    @classmethod
    def from_config(cls, data: DataConfig) -> "ShardReader":
        """The reader that a recipe describes. Raises UserError where its cache folder cannot be made."""
        cache = LocalCache(Path(data.cache_dir), int(data.cache_gib * 2**30)) if data.cache_dir else None
        return cls(data.read_retries, data.read_wait_s, data.read_timeout_s, cache)

    def read_range(self, url: str, offset: int, size: int, version: str = "") -> bytes:
        """`size` bytes from `offset`. `version` is a hash of the file's content; a cached copy is kept under it.

        Raises StorageError.
        """
        if self.cache is None or not version or is_local(url):
            return self._retry(url, lambda storage, file: storage.read_range(file, offset, size))
        data = self.cache.read(_copy_name(url, version), offset, size, partial(self._download, url))
        if len(data) < size:
            raise ends_early(display_url(url), len(data), size)
        return data

    def read(self, url: str, version: str = "") -> bytes:
        """The content of a file that fits into memory. Raises StorageError."""
        if self.cache is not None and version and not is_local(url):
            return self.read_range(url, 0, self.size(url), version)
        return self._retry(url, lambda storage, file: storage.read(file))

    def open(self, url: str) -> BinaryIO:
        """A file to read from start to end. Reading raises StorageError."""
        if is_local(url):
            return self._retry(url, lambda storage, file: open(file, "rb"))
        return io.BufferedReader(_SequentialFile(self, url), REQUEST_BYTES)

    def size(self, url: str) -> int:
        """Bytes of a file. Raises StorageError."""
        return self._retry(url, lambda storage, file: storage.size(file))

    def forget(self, url: str, version: str) -> None:
        """Drop the cached copy of a file whose bytes proved to be wrong."""
        if self.cache is not None and not is_local(url):
            self.cache.drop(_copy_name(url, version))

    def fetch_ahead(self, files: Sequence[tuple[str, str]], size: int) -> None:
        """Start to cache files, given by (URL, version) and of `size` bytes in all, in the background. Does nothing
        without a cache, or where they would evict what is being read."""
        remote = [(url, version) for url, version in files if not is_local(url)]
        if self.cache is None or not remote or size > AHEAD * self.cache.limit:
            return
        random.Random(os.getpid()).shuffle(remote)  # so that the processes of a machine share the work
        threading.Thread(target=self._make_copies, args=(self.cache, remote), name="fetch-ahead", daemon=True).start()

    def _make_copies(self, cache: LocalCache, files: Sequence[tuple[str, str]]) -> None:
        for url, version in files:
            try:
                cache.make(_copy_name(url, version), partial(self._download, url))
            except StorageError:  # the reader of the file will report it
                continue
            except (UserError, RunError) as error:
                log.warning("shards are not fetched ahead: %s", error)
                return

    def _download(self, url: str) -> tuple[int, Iterator[bytes]]:
        """Size and pieces of a remote file."""
        size = self.size(url)

        def pieces() -> Iterator[bytes]:
            for offset in range(0, size, REQUEST_BYTES):
                length = min(REQUEST_BYTES, size - offset)
                yield self._retry(url, lambda storage, file: storage.read_range(file, offset, length))  # noqa: B023

        return size, pieces()

    def _retry(self, url: str, call: Callable[[ReadStorage[str], str], Result]) -> Result:
        """The call's result; it is given a storage and the file's name there. Raises StorageError after the last try,
        or at once where another try cannot help."""
        local = is_local(url)
        storage: ReadStorage[str] = LocalStorage() if local else ObjectStorage(self.timeout_s)
        for attempt in range(self.retries + 1):
            try:
                return call(storage, local_path(url) if local else url)
            except UserError:
                raise
            except Exception as error:
                if (shortage := describe_shortage(error)) is not None:
                    raise RunError(f"{display_url(url)}: cannot be read: {shortage}") from None
                failure = as_storage_error(url, error)
            reason = failure.reason
            if failure.permanent or attempt == self.retries:
                times = f" ({attempt + 1} times)" if attempt else ""
                message = f"{display_url(url)}: cannot be read: {reason}{times}"
                raise StorageError(message, reason, failure.missing, failure.permanent)
            wait = min(self.wait_s * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
            log.warning("%s: %s; try %d of %d in %.1f s", display_url(url), reason, attempt + 2, self.retries + 1, wait)
            time.sleep(wait)
        raise AssertionError("unreachable")


def _copy_name(url: str, version: str) -> str:
    return f"{version[:16]}-{os.path.basename(urlsplit(url).path)}"


class _SequentialFile(io.RawIOBase):
    """A remote file, read from start to end."""

    def __init__(self, reader: ShardReader, url: str) -> None:
        self.reader = reader
        self.url = url
        self.offset = 0
        self.size = reader.size(url)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        size = min(len(buffer), self.size - self.offset)
        buffer[:size] = self.reader.read_range(self.url, self.offset, size) if size else b""
        self.offset += size
        return size
