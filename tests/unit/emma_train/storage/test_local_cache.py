"""Copies of remote shards: each is fetched once per machine, is complete, and all of them stay within the limit."""

import errno
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from filelock import FileLock, Timeout

from emma_train.errors import RunError, UserError
from emma_train.storage.local_cache import LocalCache, Source
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError


def content(name: str, size: int = 1000) -> bytes:
    return random.Random(name).randbytes(size)


def source(name: str, size: int = 1000, fetched: Callable[[], None] = lambda: None) -> Source:
    def open_it() -> tuple[int, Iterator[bytes]]:
        fetched()
        data = content(name, size)
        return size, iter((data[: size // 2], data[size // 2 :]))

    return open_it


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_copy_is_made_once_and_read_from_then_on(tmp_path: Path) -> None:
    cache, made = LocalCache(tmp_path, 10_000), []
    for offset, size in ((0, 10), (990, 10), (500, 1)):
        data = cache.read("a", offset, size, source("a", fetched=lambda: made.append(1)))
        assert data == content("a")[offset : offset + size]
    assert made == [1]
    assert copies(tmp_path) == {"a"}


def test_a_read_past_the_end_gives_what_there_is(tmp_path: Path) -> None:
    assert LocalCache(tmp_path, 10_000).read("a", 990, 50, source("a")) == content("a")[990:]


def test_the_copies_read_longest_ago_go_where_the_limit_would_be_passed(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 3000)
    for name in "abc":
        cache.read(name, 0, 1, source(name))
    cache.read("a", 0, 1, source("a"))  # b is now the oldest
    cache.read("d", 0, 1, source("d"))
    assert copies(tmp_path) == {"a", "c", "d"}
    cache.read("large", 0, 1, source("large", 2500))
    assert copies(tmp_path) == {"large"}


def test_a_copy_may_go_while_another_process_reads_it(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 1000)
    for number in range(20):
        name = f"{number % 3}"
        assert cache.read(name, 5, 10, source(name)) == content(name)[5:15]
        assert len(copies(tmp_path)) == 1


def test_a_limit_below_one_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_gib=.* holds less than one shard of 0\.00 GiB; raise it"):
        LocalCache(tmp_path, 999).read("a", 0, 1, source("a"))
    assert copies(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache: cannot be made"):
        LocalCache(tmp_path / "file" / "cache", 1000)


def test_a_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"data\.cache_dir .*: cannot be written \(No space left on device\)"):
        LocalCache(tmp_path, 10_000).read("a", 0, 1, source("a"))
    assert copies(tmp_path) == set()


def test_a_fetch_that_fails_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    def breaks() -> tuple[int, Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            yield content("a")[:500]
            raise StorageError("gone")

        return 1000, pieces()

    cache = LocalCache(tmp_path, 10_000)
    with pytest.raises(StorageError, match="gone"):
        cache.read("a", 0, 1, breaks)
    assert copies(tmp_path) == set()
    assert cache.read("a", 0, 1000, source("a")) == content("a")


def test_unfinished_copies_of_a_killed_process_are_not_read_and_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(bytes(1000))
    (tmp_path / "b.part").write_bytes(bytes(1000))
    old = time.time() - 3600
    os.utime(tmp_path / "b.part", (old, old))
    cache = LocalCache(tmp_path, 2000)
    assert cache.read("a", 0, 1000, source("a")) == content("a")
    cache.read("c", 0, 1, source("c"))
    assert copies(tmp_path) == {"a", "c"}


def test_nobody_lists_the_copies_while_one_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing during the rename may show neither name, and the limit would be exceeded by one copy."""
    replace, cache = os.replace, LocalCache(tmp_path, 10_000)

    def rename(old: Path, new: Path) -> None:
        with pytest.raises(Timeout), FileLock(tmp_path / "room.lock", timeout=0):
            pass
        replace(old, new)

    monkeypatch.setattr(os, "replace", rename)
    assert cache.read("a", 0, 1000, source("a")) == content("a")


def _reader(folder: Path, limit: int, seed: int, log: Path) -> None:
    cache, rng = LocalCache(folder, limit), random.Random(seed)
    for _ in range(60):
        name = f"{rng.randrange(6)}"

        def fetched(name: str = name) -> None:
            with open(log, "a") as file:
                file.write(name)
            time.sleep(0.002)

        offset = rng.randrange(900)
        assert cache.read(name, offset, 100, source(name, fetched=fetched)) == content(name)[offset : offset + 100]
        with FileLock(folder / "room.lock"):  # nobody counts, adds or renames meanwhile
            assert 1000 * len(copies(folder)) <= limit


@pytest.mark.parametrize(("limit", "most"), [(100_000, 6), (3000, 4 * 60)])
def test_processes_of_a_machine_share_copies_within_the_limit(tmp_path: Path, limit: int, most: int) -> None:
    """Four readers of six files: with room each file is fetched once, without it the limit still holds."""
    log, folder = tmp_path / "log", tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_reader, args=(folder, limit, seed, log)) for seed in range(4)]
    for process in readers:
        process.start()
    for process in readers:
        process.join(60)
    assert [process.exitcode for process in readers] == [0] * 4
    assert 6 <= len(log.read_text()) <= most


def test_a_remote_file_is_known_by_its_version(tmp_path: Path) -> None:
    """A file that is written again under the same name has another version, so no copy is out of date."""
    memory, url = fsspec.filesystem("memory"), "memory://cache-test/shard.tar"
    reader = ShardReader(cache=LocalCache(tmp_path, 10_000))
    memory.pipe_file("/cache-test/shard.tar", content("one"))
    assert reader.read_range(url, 0, 1000, "1" * 64) == content("one")
    memory.pipe_file("/cache-test/shard.tar", content("two"))
    assert reader.read_range(url, 0, 1000, "1" * 64) == content("one")
    assert reader.read_range(url, 0, 1000, "2" * 64) == content("two")
    assert copies(tmp_path) == {"1" * 16 + "-shard.tar", "2" * 16 + "-shard.tar"}
    reader.forget(url, "1" * 64)
    assert copies(tmp_path) == {"2" * 16 + "-shard.tar"}
    with pytest.raises(StorageError, match=r"shard\.tar: it ends within the record: 10 of 50 bytes"):
        reader.read_range(url, 990, 50, "2" * 64)
    assert reader.read_range(url, 0, 5) == content("two")[:5]  # without a version there is no copy
