"""One error for storage that fails. Its text has no secrets: neither a provider's words nor a URL's credentials."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from emma_train.errors import RunError, UserError
from emma_train.storage.urls import display_url

PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
"""Errors that another try does not change."""


class StorageError(RunError):
    """A file that could not be read or written."""

    def __init__(self, message: str, reason: str = "", missing: bool = False, permanent: bool = False) -> None:
        """`reason` is the message without the file's name."""
        super().__init__(message)
        self.reason = reason
        self.missing = missing
        """The file does not exist."""
        self.permanent = permanent
        """Another try does not help: the user has to change something."""


@contextmanager
def store_errors(url: object) -> Iterator[None]:
    """Turn errors of an object store into StorageError. FileNotFoundError passes unchanged."""
    try:
        yield
    except (FileNotFoundError, UserError, RunError):
        raise
    except Exception as error:
        raise as_storage_error(url, error) from None


def as_storage_error(url: object, error: Exception) -> StorageError:
    """The error as a StorageError about `url`."""
    if isinstance(error, StorageError):
        return error
    reason = describe_error(error)
    message = f"{display_url(url)}: the object store fails ({reason})"
    return StorageError(message, reason, isinstance(error, FileNotFoundError), is_permanent(error))


def is_permanent(error: Exception) -> bool:
    """Whether another try cannot help. An unknown error may be temporary."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, PERMANENT) or "Credential" in type(error).__name__


def describe_error(error: Exception) -> str:
    """What happened, in our own words: those of others may contain secrets."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, Exception):
        error = error.__context__  # torch's zip writer replaces the cause by a complaint about positions
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "access is denied"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}, {os.strerror(number)}" if isinstance(number, int) else type(error).__name__
