"""Bytes of shards wherever they are: local paths, and anything that fsspec opens (s3://, https://, ...).

A read that fails for a moment (no answer in time, a server's 5xx, a body cut short) is tried again after waits that
double, each drawn anew around its length so that a thousand readers do not come back together. Credentials come from
each provider's usual places; a message names the URL without user, password or query, and never repeats what a provider
said, since that may hold them.
"""

import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from emma_train.config.schema import DataConfig
from emma_train.errors import RunError, UserError
from emma_train.storage.local_cache import Cache

log = logging.getLogger(__name__)
Result = TypeVar("Result")
LONGEST_WAIT_S = 30.0
CHUNK = 32 << 20
"""Bytes that one request of a whole file asks for."""
AHEAD = 1 / 8
"""Largest part of the cache that is fetched ahead at once: three tasks are in one window each, and near the next."""
FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}


class StorageError(Exception):
    """Bytes that cannot be had, told without secrets."""

    def __init__(self, message: str, missing: bool = False, passing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        """There is no such file."""
        self.passing = passing
        """It was worth every try, and none helped."""


@dataclass(frozen=True)
class Storage:
    """How files are read. Stateless, so any process may read any file."""

    retries: int = 5
    """Further tries after a failure that may pass."""
    wait_s: float = 0.5
    """Wait before the first of them; each is twice as long as the one before."""
    timeout_s: float = 30.0
    """Longest time that one answer of a remote store may take."""
    cache: Cache | None = None
    """Local copies of remote files; None reads ranges."""

    @classmethod
    def of(cls, data: DataConfig) -> "Storage":
        """The storage that a recipe describes. Raises UserError where its cache cannot be."""
        cache = Cache(Path(data.cache_dir), int(data.cache_gib * 2**30)) if data.cache_dir else None
        return cls(data.read_retries, data.read_wait_s, data.read_timeout_s, cache)

    def read(self, url: str, offset: int, size: int, version: str = "") -> bytes:
        """`size` bytes from `offset`. `version` is a hash of the file's content, by which a copy of it is known.

        Raises StorageError.
        """
        if is_local(url):
            return self._tried(url, lambda: _read_local(local_path(url), offset, size))
        if self.cache is not None and version:
            data = self.cache.read(_copy_name(url, version), offset, size, partial(self._whole, url))
            if len(data) < size:
                raise StorageError(f"{shown(url)} ends within the record: {len(data)} of {size} bytes")
            return data
        return self._tried(url, lambda: self._range(url, offset, size))

    def read_all(self, url: str, version: str = "") -> bytes:
        """The whole of a file that fits into memory. Raises StorageError."""
        if is_local(url):
            return self._tried(url, lambda: Path(local_path(url)).read_bytes())
        if self.cache is not None and version:
            return self.read(url, 0, self.size(url), version)
        return self._tried(url, lambda: _fetch(url, None, None, self.timeout_s))

    def open(self, url: str) -> BinaryIO:
        """A file to be read from its start to its end. Reading raises StorageError."""
        if is_local(url):
            return self._tried(url, lambda: open(local_path(url), "rb"))
        return io.BufferedReader(_Sequential(self, url), CHUNK)

    def size(self, url: str) -> int:
        """Bytes of a file. Raises StorageError."""
        if is_local(url):
            return self._tried(url, lambda: os.stat(local_path(url)).st_size)
        return self._tried(url, lambda: _size(url, self.timeout_s))

    def forget(self, url: str, version: str) -> None:
        """Drop the local copy of a file whose bytes proved to be wrong."""
        if self.cache is not None and not is_local(url):
            self.cache.drop(_copy_name(url, version))

    def fetch_ahead(self, files: Sequence[tuple[str, str]], size: int) -> None:
        """Begin to make local copies of files of `size` bytes in all, by (URL, version), in the background. Without a
        cache, or where they would drive out what is being read, nothing is done."""
        remote = [(url, version) for url, version in files if not is_local(url)]
        if self.cache is None or not remote or size > AHEAD * self.cache.limit:
            return
        random.Random(os.getpid()).shuffle(remote)  # so that the processes of a machine share the work
        threading.Thread(target=self._make_copies, args=(self.cache, remote), name="fetch-ahead", daemon=True).start()

    def _make_copies(self, cache: Cache, files: Sequence[tuple[str, str]]) -> None:
        for url, version in files:
            try:
                cache.make(_copy_name(url, version), partial(self._whole, url))
            except StorageError:  # whoever reads it will tell
                continue
            except (UserError, RunError) as error:
                log.warning("shards are not fetched ahead: %s", error)
                return

    def _whole(self, url: str) -> tuple[int, Iterator[bytes]]:
        """Size and pieces of a remote file."""
        size = self.size(url)

        def pieces() -> Iterator[bytes]:
            for offset in range(0, size, CHUNK):
                wanted = min(CHUNK, size - offset)
                yield self._tried(url, lambda: self._range(url, offset, wanted))  # noqa: B023 - called at once

        return size, pieces()

    def _range(self, url: str, offset: int, size: int) -> bytes:
        data = _fetch(url, offset, size, self.timeout_s)
        if len(data) > size:
            raise StorageError(
                f"{shown(url)}: the server sends whole files where ranges are asked for; use another server, "
                f"or copy the shards to a local folder"
            )
        return data

    def _tried(self, url: str, call: Callable[[], Result]) -> Result:
        """The call's result, tried again while its failure may pass."""
        for attempt in range(self.retries + 1):
            try:
                return call()
            except (StorageError, UserError):
                raise
            except Exception as error:
                told, for_good = _told(error), _is_for_good(error)
                if is_local(url):
                    _opened.cache_clear()  # a handle may have gone stale with its server
                if for_good or attempt == self.retries:
                    times = "" if attempt == 0 else f" ({attempt + 1} times)"
                    missing = isinstance(error, FileNotFoundError)
                    raise StorageError(f"{shown(url)}: cannot be read: {told}{times}", missing, not for_good) from None
            wait = min(self.wait_s * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.5)
            log.warning("%s: %s; try %d of %d in %.1f s", shown(url), told, attempt + 2, self.retries + 1, wait)
            time.sleep(wait)
        raise AssertionError("unreachable")


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def join(folder: str | Path, name: str) -> str:
    """The URL of a file in a folder; the folder's query (a token of access) goes with it."""
    folder = str(folder)
    if is_local(folder):
        return os.path.join(local_path(folder), name)
    return _with_path(folder, lambda path: f"{path.rstrip('/')}/{name}")


def beside(url: str, suffix: str, other: str) -> str:
    """The URL of the file that has another suffix."""
    return _with_path(url, lambda path: path.removesuffix(suffix) + other)


def _with_path(url: str, change: Callable[[str], str]) -> str:
    if not url.startswith(("http://", "https://")):  # elsewhere a name may hold a question mark
        return change(url)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=change(parts.path)))


def shown(url: str | Path) -> str:
    """A URL as messages may show it: without user, password, query and fragment."""
    if is_local(str(url)):
        return local_path(str(url))
    parts = urlsplit(str(url))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _copy_name(url: str, version: str) -> str:
    return f"{version[:16]}-{os.path.basename(urlsplit(url).path)}"


def _is_for_good(error: Exception) -> bool:
    """Whether another try cannot help. What is unknown may pass."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FOR_GOOD) or "Credential" in type(error).__name__


def _told(error: Exception) -> str:
    """What happened, without the texts of others."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status}"
    if isinstance(error, _Short):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    strerror = getattr(error, "strerror", None) if getattr(error, "errno", None) else None
    return f"{type(error).__name__} ({strerror})" if strerror else type(error).__name__


class _Short(OSError):
    """Fewer bytes than the file should have."""


class _Sequential(io.RawIOBase):
    """A remote file, read forward."""

    def __init__(self, storage: Storage, url: str) -> None:
        self.storage, self.url, self.at, self.size = storage, url, 0, storage.size(url)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        size = min(len(buffer), self.size - self.at)
        buffer[:size] = self.storage.read(self.url, self.at, size) if size else b""
        self.at += size
        return size


class _Handle:
    """An open file that closes when nobody holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=256)
def _opened(path: str) -> _Handle:
    return _Handle(path)


def _read_local(path: str, offset: int, size: int) -> bytes:
    handle = _opened(path)  # held by name, so that it stays open if the cache lets it go
    data = os.pread(handle.descriptor, size, offset)
    if len(data) == size:
        return data
    # A pread may give less than asked for (2 GiB at once, or a network file system); only its end gives nothing.
    pieces = [data]
    while (got := sum(map(len, pieces))) < size:
        pieces.append(os.pread(handle.descriptor, size - got, offset + got))
        if not pieces[-1]:
            raise StorageError(f"{path} ends within the record: {got} of {size} bytes")
    return b"".join(pieces)


def _fetch(url: str, offset: int | None, size: int | None, timeout_s: float) -> bytes:
    """A range of a remote file, or all of it. Raises what the store raises, or _Short."""
    system, path = _file_system(url)
    limit = {"timeout": timeout_s} if system.async_impl else {}
    end = None if offset is None or size is None else offset + size
    data: bytes = system.cat_file(path, start=offset, end=end, **limit)
    if size is not None and len(data) < size:
        raise _Short(f"{len(data)} of {size} bytes came")
    return data


def _size(url: str, timeout_s: float) -> int:
    system, path = _file_system(url)
    info = system.info(path, **({"timeout": timeout_s} if system.async_impl else {}))
    if info.get("size") is None:
        raise StorageError(f"{shown(url)}: the server does not tell its size")
    return int(info["size"])


def _file_system(url: str):  # type: ignore[no-untyped-def]
    """fsspec's file system of a URL, and the path in it. fsspec keeps one of each per process."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        extra = f"; pip install 'emma-train[{EXTRAS[scheme]}]'" if scheme in EXTRAS else ""
        raise UserError(
            f"{shown(url)}: {scheme}:// needs a package that is not installed ({error.name}){extra}"
        ) from None
    except ValueError:
        raise UserError(f"{shown(url)}: fsspec knows no file system {urlsplit(url).scheme}://") from None
