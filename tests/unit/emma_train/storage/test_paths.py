"""A path or URL of a user becomes a local path or one in an object store, or one line says why not."""

import sys
from pathlib import Path

import pytest
from upath import UPath

from emma_train.errors import UserError
from emma_train.storage.local_storage import LocalStorage
from emma_train.storage.object_storage import ObjectStorage
from emma_train.storage.paths import as_local, as_remote, parse_path, storage_of


def test_what_is_no_url_is_a_local_path(tmp_path: Path) -> None:
    assert parse_path("runs/one") == Path("runs/one") == parse_path("file://runs/one")
    assert parse_path(tmp_path) is tmp_path
    remote = parse_path("memory://bucket/runs/one/")
    assert isinstance(remote, UPath) and not isinstance(remote, Path)
    assert (remote.name, str(remote / "step-1")) == ("one", "memory://bucket/runs/one/step-1")


def test_a_path_knows_its_storage(tmp_path: Path) -> None:
    remote = parse_path("memory://bucket/runs")
    assert isinstance(storage_of(tmp_path), LocalStorage) and isinstance(storage_of(remote), ObjectStorage)
    assert as_local(tmp_path) is tmp_path and as_remote(tmp_path) is None
    assert as_local(remote) is None and as_remote(remote) is remote


@pytest.mark.parametrize("url", ["s3://me:topsecret@bucket/runs", "s3://bucket/runs?sig=topsecret"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="^s3://bucket/runs: the URL must hold no password and no query") as error:
        parse_path(url)
    assert "topsecret" not in str(error.value)


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3:// needs a package that is not installed.*'emma-train\[s3\]'"):
        parse_path("s3://bucket/runs")
