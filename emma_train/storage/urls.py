"""Names of files as users give them: local paths, file:// URLs, and URLs that fsspec opens (s3://, https://, ...)."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from emma_train.config.values import bucket_problem
from emma_train.errors import UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""Scheme -> extra of emma-train that installs the package for it."""


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def check_url(url: str) -> None:
    """Raise UserError where a URL lacks the bucket or host that its kind needs."""
    if problem := bucket_problem(url):
        raise UserError(f"the URL is {problem}")


def check_local(path: Path) -> None:
    """Raise UserError where the path of a local file or folder was given as a URL; Path makes s3:/ of s3://."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise UserError(f"{path}: this must be a local path, not a URL")


def join_url(folder: str | Path, name: str) -> str:
    """The URL of a file in a folder. A query of the folder's URL (an access token) is kept."""
    folder = str(folder)
    if is_local(folder):
        return os.path.join(local_path(folder), name)
    return _with_path(folder, lambda path: f"{path.rstrip('/')}/{name}")


def parent_url(url: str) -> str:
    """The URL of the folder of a file."""
    return os.path.dirname(url) if is_local(url) else _with_path(url, lambda path: path.rpartition("/")[0])


def replace_suffix(url: str, suffix: str, other: str) -> str:
    """The URL of the file beside it with another suffix."""
    return _with_path(url, lambda path: path.removesuffix(suffix) + other)


def _with_path(url: str, change: Callable[[str], str]) -> str:
    if not url.startswith(("http://", "https://")):  # in other schemes a name may contain a question mark
        return change(url)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=change(parts.path)))


def is_file_name(name: object) -> bool:
    """Whether a name from a file that others wrote is that of one file in a folder: no path, and not `..`."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_inner_path(path: object) -> bool:
    """Whether a path from a file that others wrote is relative and stays in its folder."""
    return isinstance(path, str) and all(map(is_file_name, path.split("/")))


def display_url(url: object) -> str:
    """A URL or path as messages may show it: without user, password, query and fragment."""
    text = str(url)
    if is_local(text):
        return local_path(text)
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def opening_errors(url: str) -> Iterator[None]:
    """Turn errors of opening fsspec's file system for `url` into UserError, which says what to install."""
    scheme = urlsplit(url).scheme
    try:
        yield
    except ImportError as error:
        hint = f"pip install 'emma-train[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "install fsspec's package for it"
        package = error.name or error
        raise UserError(
            f"{display_url(url)}: {scheme}:// needs a package that is not installed ({package}); {hint}"
        ) from None
    except (TypeError, ValueError):
        raise UserError(f"{display_url(url)}: fsspec knows no file system {scheme}://") from None
