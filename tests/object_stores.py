"""An object store for tests, folder://PATH: it keeps its objects in a folder that processes share.

Nothing can be renamed, folders are there as long as a file is below them, and a file is there once it is closed: whole,
or not at all where its writer is killed. Every request goes through `FolderStore.request`, where tests let it fail.
"""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from upath import UPath
from upath.registry import register_implementation

Request = Callable[[str, str], None]
"""(get, part, put, head, list, copy or delete; path) -> a fault instead of the answer: raise, hang, kill."""


def url_of(folder: Path) -> str:
    """The URL of a folder's content in the store."""
    return f"folder://{folder}"


def answered(kind: str, path: str) -> None:
    """Answer the request without a fault."""


class FolderStore(AbstractFileSystem):
    protocol = "folder"
    root_marker = "/"
    request: Request = staticmethod(answered)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return "/" + os.fspath(path).removeprefix("folder://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return _Upload(self, path)
        self.request("head", path)
        self.request("get", path)
        return io.BytesIO(Path(path).read_bytes())

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.request("head", path)
        return _info(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self.request("list", path)
        entries = [_info(entry.path) for entry in os.scandir(path)] if os.path.isdir(path) else [_info(path)]
        return entries if detail else [info["name"] for info in entries]

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        pass

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        self.request("copy", path1)
        _put(path2, Path(path1).read_bytes())

    def rm_file(self, path: str) -> None:
        self.request("delete", path)
        os.unlink(path)
        with contextlib.suppress(OSError):  # a folder is not empty, or another process has removed it
            os.removedirs(os.path.dirname(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = self._strip_protocol(path if isinstance(path, str) else path[0])
        for file in self.find(path) if recursive else [path]:
            self.rm_file(file)


class FolderPath(UPath):
    """Registers the store with universal_pathlib."""


class _Upload(io.BytesIO):
    def __init__(self, store: FolderStore, path: str) -> None:
        super().__init__()
        self.store, self.path = store, path

    def write(self, content: Any) -> int:
        self.store.request("part", self.path)
        return super().write(content)

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self.store.request("put", self.path)
            _put(self.path, content)


def _put(path: str, content: bytes) -> None:
    beside = Path(path).with_name(f".{os.getpid()}.upload")
    while True:
        with contextlib.suppress(FileNotFoundError):  # another process removes the folder with its last file
            os.makedirs(beside.parent, exist_ok=True)
            beside.write_bytes(content)
            return os.replace(beside, path)


def _info(path: str) -> dict[str, Any]:
    if os.path.isdir(path):
        return {"name": path, "type": "directory", "size": 0}
    return {"name": path, "type": "file", "size": os.stat(path).st_size}


fsspec.register_implementation("folder", FolderStore, clobber=True)
register_implementation("folder", FolderPath, clobber=True)
