"""An object store answers, or fails with an error that does not repeat its words."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from upath import UPath

from emma_train.errors import RunError, UserError
from emma_train.storage.object_storage import ObjectStorage
from emma_train.storage.paths import parse_path
from emma_train.storage.storage_error import StorageError, store_errors
from tests.object_stores import FolderStore, answered, url_of

STORAGE = ObjectStorage()


@pytest.fixture(autouse=True)
def _answering() -> Iterator[None]:
    yield
    FolderStore.request = staticmethod(answered)


@pytest.fixture
def remote(tmp_path: Path) -> UPath:
    return cast(UPath, parse_path(url_of(tmp_path / "run")))


def test_files_are_written_listed_and_read(remote: UPath) -> None:
    assert STORAGE.listdir(remote) == [] and STORAGE.listed_sizes(remote) == {} and not STORAGE.exists(remote / "a")
    STORAGE.write(remote / "a", b"123")
    STORAGE.write(remote / "b" / "c", b"12345")
    assert sorted(STORAGE.listdir(remote)) == [remote / "a", remote / "b"]
    assert STORAGE.listed_sizes(remote) == {"a": 3, "b/c": 5}
    assert STORAGE.size(remote / "b" / "c") == 5
    assert STORAGE.exists(remote / "a") and not STORAGE.exists(remote / "b") and not STORAGE.exists(remote / "c")
    assert STORAGE.read(remote / "a") == b"123" and STORAGE.read_range(remote / "b" / "c", 1, 3) == b"234"
    assert STORAGE.read(f"{remote}/a") == b"123" and STORAGE.size(f"{remote}/a") == 3
    with STORAGE.open(remote / "a") as file:
        assert file.read() == b"123"
    for call in (STORAGE.size, STORAGE.read):
        with pytest.raises(FileNotFoundError):
            call(remote / "c")
    with pytest.raises(StorageError, match=r"b/c: 2 of 3 bytes came$"):
        STORAGE.read_range(remote / "b" / "c", 3, 3)


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    ("kind", "error", "expected", "message"),
    [
        ("put", PermissionError("user:secret may not"), UserError, "the object store fails (access is denied)"),
        ("put", NoCredentialsError("secret"), UserError, "the object store fails (NoCredentialsError)"),
        ("put", FileNotFoundError("secret"), UserError, "there is no such bucket, or it cannot be written to"),
        ("get", TimeoutError("secret"), RunError, "the object store fails (no answer in time)"),
        ("delete", OSError(28, "secret"), RunError, "the object store fails (OSError, No space left on device)"),
    ],
)
def test_a_folder_is_probed_and_a_failure_is_the_users_or_the_stores(
    remote: UPath, tmp_path: Path, kind: str, error: Exception, expected: type[Exception], message: str
) -> None:
    STORAGE.check_writable(remote, "probe")
    assert not (tmp_path / "run").exists()

    def request(asked: str, path: str) -> None:
        if asked == kind:
            raise error

    FolderStore.request = staticmethod(request)
    with pytest.raises(expected) as caught:
        STORAGE.check_writable(remote, "probe")
    assert str(caught.value) == f"{remote}: {message}"


def test_errors_become_one_kind_and_a_missing_file_stays_one(remote: UPath) -> None:
    with pytest.raises(StorageError) as caught, store_errors(remote):
        raise PermissionError("secret")
    assert caught.value.permanent and not caught.value.missing and "secret" not in str(caught.value)
    with pytest.raises(StorageError) as caught, store_errors("s3://me:secret@bucket/a?sig=secret"):
        raise ConnectionError("secret")
    assert not caught.value.permanent and str(caught.value) == "s3://bucket/a: the object store fails (ConnectionError)"
    with pytest.raises(FileNotFoundError), store_errors(remote):
        raise FileNotFoundError
