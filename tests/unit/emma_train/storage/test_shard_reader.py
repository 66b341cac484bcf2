"""A slow or failing server gives correct bytes or an error without secrets."""

import logging
import os
import random
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pytest

from emma_train.errors import UserError
from emma_train.storage import shard_reader as module
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, join_url
from tests.servers import Fault, FileServer, serving

CONTENT = random.Random(0).randbytes(10_000)
QUICK = ShardReader(retries=3, wait_s=0.01, timeout_s=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(CONTENT)
    return tmp_path


def http(folder: Path, fault: Fault = lambda number, path: "") -> AbstractContextManager[FileServer]:
    pytest.importorskip("aiohttp", reason="pip install 'emma-train[http]'")
    return serving(folder, fault)


def test_a_local_file_is_read_by_range_in_full_and_in_sequence(folder: Path) -> None:
    for url in (str(folder / "set" / "a.bin"), f"file://{folder}/set/a.bin"):
        assert QUICK.read_range(url, 100, 50) == CONTENT[100:150]
        assert QUICK.read(url) == CONTENT
        assert QUICK.size(url) == len(CONTENT)
        with QUICK.open(url) as file:
            assert file.read(7) + file.read(20_000) == CONTENT


def test_a_remote_file_is_read_by_range_in_full_and_in_sequence() -> None:
    fsspec.filesystem("memory").pipe_file("/storage/a.bin", CONTENT)
    url = "memory://storage/a.bin"
    assert QUICK.read_range(url, 100, 50) == CONTENT[100:150]
    assert QUICK.read(url) == CONTENT
    assert QUICK.size(url) == len(CONTENT)
    with QUICK.open(url) as file:
        assert file.read(7) + file.read(20_000) == CONTENT


def test_http_ranges_ask_for_no_more_than_they_need(folder: Path) -> None:
    with http(folder) as server:
        assert QUICK.read_range(f"{server.url}/set/a.bin", 100, 50) == CONTENT[100:150]
        assert server.gets == ["/set/a.bin bytes=100-149"]


@pytest.mark.parametrize("kind", ["500", "503", "429", "408", "short", "reset"])
def test_a_temporary_failure_is_tried_again_until_it_passes(folder: Path, kind: str) -> None:
    with http(folder, lambda number, path: kind if number <= 3 else "") as server:
        assert QUICK.read_range(f"{server.url}/set/a.bin", 10, 1000) == CONTENT[10:1010]
        assert len(server.gets) == 4


def test_an_answer_that_is_too_late_is_requested_again(folder: Path) -> None:
    with http(folder, lambda number, path: "slow" if number == 1 else "") as server:
        server.slow_s = 3.0
        assert (
            ShardReader(retries=1, wait_s=0.01, timeout_s=0.3).read_range(f"{server.url}/set/a.bin", 0, 5)
            == CONTENT[:5]
        )


def test_waits_double_up_to_half_a_minute_and_are_jittered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with http(folder, lambda number, path: "503") as server, pytest.raises(StorageError, match=r"503 \(10 times\)"):
        ShardReader(retries=9, wait_s=0.5).read_range(f"{server.url}/set/a.bin", 0, 5)
    expected = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(0.5 * e <= wait <= 1.5 * e for wait, e in zip(waits, expected, strict=True))
    assert len({wait / e for wait, e in zip(waits, expected, strict=True)}) == 9


@pytest.mark.parametrize(
    ("status", "reason"), [("404", "no such file"), ("403", "the server answers 403"), ("401", "401")]
)
def test_a_permanent_failure_is_an_error_at_once(folder: Path, status: str, reason: str) -> None:
    with http(folder, lambda number, path: status) as server:
        with pytest.raises(StorageError, match=reason) as caught:
            QUICK.read_range(f"{server.url}/set/a.bin", 0, 5)
        assert len(server.gets) == 1
        assert caught.value.missing == (status == "404")


def test_a_server_that_ignores_ranges_is_an_error(folder: Path) -> None:
    with http(folder, lambda number, path: "whole") as server, pytest.raises(StorageError, match="sends whole files"):
        QUICK.read_range(f"{server.url}/set/a.bin", 10, 5)


def test_no_message_holds_a_password_or_a_signature(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the error, nor its cause, nor the warnings of earlier tries."""
    caplog.set_level(logging.DEBUG, logger="emma_train")
    with http(folder, lambda number, path: "503" if number < 3 else "403") as server:
        host = server.url.removeprefix("http://")
        url = f"http://someone:hunter2@{host}/set/a.bin?X-Amz-Signature=abcdef&sig=topsecret"
        with pytest.raises(StorageError) as caught:
            QUICK.read_range(url, 0, 5)
    text = caplog.text + "".join(traceback.format_exception(caught.value))
    assert f"http://{host}/set/a.bin" in text
    assert not any(secret in text for secret in ("someone", "hunter2", "abcdef", "topsecret", "X-Amz"))


def test_a_missing_local_file_is_an_error_without_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(StorageError, match=r"none\.tar: cannot be read: no such file") as caught:
        QUICK.read_range(str(tmp_path / "none.tar"), 0, 5)
    assert caught.value.missing


def test_a_stale_handle_of_a_network_file_system_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pread, []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(116, "Stale file handle")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert QUICK.read_range(str(folder / "set" / "a.bin"), 0, 5) == CONTENT[:5]


def test_the_number_of_open_files_is_limited(tmp_path: Path) -> None:
    """A data set has more shards than a process may have open files."""
    for number in range(400):
        (tmp_path / f"{number}").write_bytes(b"x")
        QUICK.read_range(str(tmp_path / f"{number}"), 0, 1)
    links = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in _target(link)]
    assert 0 < len(links) <= 256


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("folder_url", "expected"),
    [
        ("/data/set", "/data/set/a.tar"),
        ("file:///data/set", "/data/set/a.tar"),
        ("s3://bucket/set/", "s3://bucket/set/a.tar"),
        ("https://host/set?sig=x", "https://host/set/a.tar?sig=x"),
    ],
)
def test_a_file_of_a_folder(folder_url: str, expected: str) -> None:
    assert join_url(folder_url, "a.tar") == expected


def test_displayed_urls_have_no_secrets() -> None:
    assert display_url("s3://key:secret@bucket/set/a.tar") == "s3://bucket/set/a.tar"
    assert display_url("https://u:p@host:8080/a.tar?token=1#x") == "https://host:8080/a.tar"
    assert display_url("/data/a.tar") == "/data/a.tar"


def test_a_scheme_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ModuleNotFoundError("no", name="s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://.*not installed \(s3fs\); pip install 'emma-train\[s3\]'"):
        QUICK.read_range("s3://bucket/a.tar", 0, 5)


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(UserError, match="fsspec knows no file system nonsense://"):
        QUICK.read_range("nonsense://bucket/a.tar", 0, 5)
