"""Paths of checkpoints: a pathlib.Path in a local folder, a UPath with the same methods in an object store."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upath import UPath

from emma_train.errors import UserError
from emma_train.storage.local_storage import LocalStorage
from emma_train.storage.object_storage import ObjectStorage
from emma_train.storage.protocol import Storage
from emma_train.storage.urls import check_url, display_url, is_local, local_path, opening_errors

StoragePath = Path | UPath
_LOCAL: Storage[Path] = LocalStorage()
_REMOTE: Storage[UPath] = ObjectStorage()


def parse_path(path: str | StoragePath) -> StoragePath:
    """The path that a user gives as a path or a URL. Raises UserError where the URL lacks a bucket or host, or where
    no installed package opens it."""
    if not isinstance(path, str):
        return path
    if is_local(path):
        return Path(local_path(path))
    check_url(path)
    url = urlsplit(path)
    if url.password is not None or url.query:
        raise UserError(
            f"{display_url(path)}: the URL must hold no password and no query, for it is written to logs and "
            "checkpoints; credentials come from the provider's usual places"
        )
    with opening_errors(path):
        # Other processes write there too, so a listing must not be kept.
        remote = UPath(path.rstrip("/"), use_listings_cache=False)
        remote.fs  # noqa: B018 - imports fsspec's package for the scheme
    return remote


def storage_of(path: StoragePath) -> Storage[Any]:
    """The storage that a path lies in."""
    return _LOCAL if isinstance(path, Path) else _REMOTE


def as_local(path: StoragePath) -> Path | None:
    """The path if it is a local one, for what works on local files only."""
    return path if isinstance(path, Path) else None


def as_remote(path: StoragePath) -> UPath | None:
    """The path if it lies in an object store."""
    return None if isinstance(path, Path) else path
