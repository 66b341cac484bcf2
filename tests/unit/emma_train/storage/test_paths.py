"""A path or URL becomes a place, or one line says why not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from emma_train.errors import RunError, UserError
from emma_train.storage import paths as places
from tests.object_stores import FolderStore, answered, url_of


@pytest.fixture(autouse=True)
def _answering() -> Iterator[None]:
    yield
    FolderStore.request = staticmethod(answered)


def test_what_is_no_url_is_a_folder(tmp_path: Path) -> None:
    assert places.of("runs/one") == Path("runs/one") == places.of("file://runs/one")
    assert places.of(tmp_path) is tmp_path
    place = places.of("memory://bucket/runs/one/")
    assert isinstance(place, UPath) and not isinstance(place, Path)
    assert (place.name, str(place / "step-1")) == ("one", "memory://bucket/runs/one/step-1")


@pytest.mark.parametrize("url", ["s3://me:topsecret@bucket/runs", "s3://bucket/runs?sig=topsecret"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="^s3://bucket/runs: the URL must hold no password and no query") as error:
        places.of(url)
    assert "topsecret" not in str(error.value)


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3:// needs a package that is not installed.*'emma-train\[s3\]'"):
        places.of("s3://bucket/runs")


def test_a_store_is_asked_for_what_lies_in_it(tmp_path: Path) -> None:
    place = places.of(url_of(tmp_path / "run"))
    assert isinstance(place, UPath)
    assert places.children(place) == [] and places.sizes(place) == {} and not places.there(place / "a")
    place.fs.pipe_file((place / "a").path, b"123")
    place.fs.pipe_file((place / "b" / "c").path, b"12345")
    assert sorted(places.children(place)) == [place / "a", place / "b"]
    assert places.sizes(place) == {"a": 3, "b/c": 5}
    assert places.size(place / "b" / "c") == 5
    assert places.there(place / "a") and not places.there(place / "b") and not places.there(place / "c")
    assert sorted(places.children(tmp_path / "run")) == [tmp_path / "run" / "a", tmp_path / "run" / "b"]
    with pytest.raises(FileNotFoundError):
        places.size(place / "c")


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    ("kind", "error", "whose", "said"),
    [
        ("put", PermissionError("user:secret may not"), UserError, "the store fails (access is denied)"),
        ("put", NoCredentialsError("secret"), UserError, "the store fails (NoCredentialsError)"),
        ("put", FileNotFoundError("secret"), UserError, "there is no such bucket, or it cannot be written to"),
        ("get", TimeoutError("secret"), RunError, "the store fails (no answer in time)"),
        ("delete", OSError(28, "secret"), RunError, "the store fails (OSError, No space left on device)"),
    ],
)
def test_a_store_is_tried_and_its_words_are_left_out(
    tmp_path: Path, kind: str, error: Exception, whose: type[Exception], said: str
) -> None:
    place = places.of(url_of(tmp_path / "run"))
    places.check(place, "probe")
    assert not (tmp_path / "run").exists()

    def request(asked: str, path: str) -> None:
        if asked == kind:
            raise error

    FolderStore.request = staticmethod(request)
    with pytest.raises(whose) as told:
        places.check(place, "probe")
    assert str(told.value) == f"{place}: {said}"


def test_a_folder_is_not_probed_and_its_errors_are_its_own(tmp_path: Path) -> None:
    places.check(tmp_path / "nowhere", "probe")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(PermissionError), places.asking(tmp_path):
        raise PermissionError("mine")
    with pytest.raises(RunError), places.asking(places.of("memory://x")):
        raise PermissionError("the store's")
