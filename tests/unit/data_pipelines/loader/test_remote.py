"""Remote shards give the same samples as local ones, also if the server is slow, fails or cuts answers short."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from data_pipelines.cli import main
from data_pipelines.loader.loader import Stream
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.requests import read_requests
from data_pipelines.planner.planner import Planner
from data_pipelines.shards.encode_latents import cache_latents
from data_pipelines.shards.index import read_manifest
from emma_train.config.schema import ImageConfig, Recipe
from emma_train.errors import RunError, UserError
from emma_train.model.autoencoder import fingerprint
from emma_train.sequence.step_batches import StepBatches
from tests.helpers import PATCH, SHUFFLE, assert_same_pack, tiny_model, tiny_recipe, tokenizer
from tests.servers import FileServer, s3_serving, serving
from tests.shards import damage, every_task, write_shards

STEPS = 4
pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("remote") / "set", every_task(12), per_shard=6)


def recipe_of(url: str | Path, **dotted: Any) -> Recipe:
    settings = {"data__slots": 6, "data__samples_per_step": 18, "data__read_wait_s": 0.01, **dotted}
    return tiny_recipe(data__sources=[{"path": str(url)}], **settings)


def steps_of(recipe: Recipe) -> list[StepBatches]:
    return list(Stream(recipe, 0, 1, None).steps(1, STEPS))


def assert_same(one: list[StepBatches], other: list[StepBatches]) -> None:
    assert [(s.digest, s.unreadable) for s in one] == [(s.digest, s.unreadable) for s in other]
    for a, b in zip((p for s in one for p in s.packs), (p for s in other for p in s.packs), strict=True):
        assert_same_pack(a, b)


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The folder in fsspec's in-memory file system, which forked workers inherit."""
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/remote/{path.name}", path.read_bytes())
    yield "memory://remote"
    system.rm("/remote", recursive=True)


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    pytest.importorskip("aiohttp", reason="pip install 'emma-train[http]'")
    with serving(folder) as server:
        yield server


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_packs_from_another_file_system_are_the_local_ones(
    folder: Path, memory: str, tmp_path: Path, workers: int, cached: bool
) -> None:
    cache = {"data__cache_dir": str(tmp_path / "cache"), "data__cache_gib": 0.1} if cached else {}
    assert_same(steps_of(recipe_of(memory, data__workers=workers, **cache)), steps_of(recipe_of(folder)))
    if cached:
        copies = sorted(path.suffixes[-1] for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
        assert copies == [".parquet"] * 6 + [".tar"] * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_now_and_then_and_is_slow_changes_nothing(
    folder: Path, server: FileServer, workers: int
) -> None:
    """Of every nine answers one is a 503, one is cut short and one breaks the connection; two answers are late."""
    faults = {2: "503", 4: "short", 8: "reset"}
    server.fault = lambda number, path: "slow" if number in (30, 60) else faults.get(number % 9, "")
    server.slow_s = 3.0
    # Which read meets which answer is chance: with six tries, one in a thousand would meet nothing but faults.
    recipe = recipe_of(server.url, data__workers=workers, data__read_timeout_s=1.5, data__read_retries=20)
    assert_same(steps_of(recipe), steps_of(recipe_of(folder)))


def test_a_server_whose_bytes_come_wrong_once_is_asked_again(folder: Path, memory: str) -> None:
    """The checksum detects it; the second answer has the right bytes."""
    recipe = recipe_of(memory)
    reader, planned = (
        SampleReader(recipe.data, tokenizer(), PATCH, SHUFFLE, None),
        Planner(recipe, tokenizer()).plan(1).slots[0][0],
    )
    real, answers, read_file = reader.storage.read_range, [], reader.storage.read

    class Flipping:
        def read(self, *words: Any) -> bytes:
            return read_file(*words)

        def read_range(self, *words: Any) -> bytes:
            data = bytearray(real(*words))
            data[600] ^= len(answers) == 0
            answers.append(1)
            return bytes(data)

        def forget(self, url: str, version: str) -> None:
            pass

    reader.storage = Flipping()  # type: ignore[assignment]
    assert reader.read(planned).key == planned.key
    assert len(answers) == 2


def test_a_copy_that_went_bad_on_disk_is_fetched_again(folder: Path, memory: str, tmp_path: Path) -> None:
    recipe = recipe_of(memory, data__cache_dir=str(tmp_path / "cache"), data__cache_gib=0.1)
    local = steps_of(recipe_of(folder))
    assert_same(steps_of(recipe), local)
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.write_bytes(bytes(copy.stat().st_size))
    assert_same(steps_of(recipe), local)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_disappears_is_replaced_by_spares_of_others(
    server: FileServer, tmp_path: Path, cached: bool
) -> None:
    cache = {"data__cache_dir": str(tmp_path / "cache"), "data__cache_gib": 0.1} if cached else {}
    server.fault = lambda number, path: "404" if path.endswith("shard-000002.tar") else ""
    loaded = steps_of(recipe_of(server.url, **cache))
    failed_keys = {failed.key for step in loaded for failed in step.unreadable}
    assert failed_keys == {f"{letter}{number:03d}" for letter in "qpe" for number in (4, 5)}
    assert {failed.shard for step in loaded for failed in step.unreadable} == {"shard-000002.tar"}
    assert all("no such file" in failed.reason for step in loaded for failed in step.unreadable)
    assert sum(step.dropped for step in loaded) == 0
    assert sum(len(batch.keys) for step in loaded for batch in step.packs) == 18 * STEPS
    # It is asked for each time, once, and once where a window is fetched ahead: no time is lost with tries in vain.
    windows = 3 * (STEPS * 6 // 12 + 1) if cached else 0
    assert (
        sum("shard-000002.tar" in get for get in server.gets) <= sum(len(step.unreadable) for step in loaded) + windows
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_does_not_answer_any_more_ends_the_run_soon(server: FileServer, workers: int) -> None:
    """Substitutes are in the same object store: two that cannot be reached are enough to stop."""
    stream = Stream(recipe_of(server.url, data__workers=workers, data__read_retries=2), 0, 1, None)
    stream.planner.check()
    server.fault = lambda number, path: "503"
    server.gets.clear()
    (loaded,) = stream.steps(1, STEPS)
    assert isinstance(loaded.failure, RunError)
    assert "the server answers 503 (3 times); nor could" in str(loaded.failure)
    assert str(loaded.failure).endswith("Is the store up?")
    assert len(server.gets) <= 6 * 3 * 2 * 3  # samples of three packs, two of each, three tries


def test_many_reads_are_under_way_at_once(server: FileServer) -> None:
    """One after another, eighteen answers of 0.3 s would take five seconds."""
    recipe = recipe_of(server.url, data__slots=1)
    stream = Stream(recipe, 0, 1, None)
    server.fault, server.slow_s, under_way, most = lambda number, path: "slow", 0.3, [0], [0]
    real = server.answer

    def counted(*words: Any) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        real(*words)
        under_way[0] -= 1

    server.answer = counted  # type: ignore[method-assign]
    (loaded,) = stream.steps(1, 1)
    assert (len(loaded.packs[0].keys), loaded.unreadable) == (18, [])
    assert most[0] >= 8


def test_a_local_shard_that_disappears_while_the_run_goes_on_is_replaced(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(12), per_shard=6)
    stream = Stream(recipe_of(folder), 0, 1, None)
    os.unlink(folder / "shard-000002.tar")
    loaded = list(stream.steps(1, STEPS))
    assert {failed.key for step in loaded for failed in step.unreadable} == {
        f"{a}{n:03d}" for a in "qpe" for n in (4, 5)
    }
    assert sum(len(batch.keys) for step in loaded for batch in step.packs) == 18 * STEPS


def test_a_truncated_local_shard_loses_what_is_beyond_its_end_only(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(12), per_shard=36)
    tar = folder / "shard-000000.tar"
    stream = Stream(recipe_of(folder), 0, 1, None)
    keep = tar.stat().st_size // 2
    os.truncate(tar, keep)
    loaded = list(stream.steps(1, STEPS))
    failed_keys = {failed.key for step in loaded for failed in step.unreadable}
    assert 12 <= len(failed_keys) <= 24
    assert all("ends within the record" in failed.reason for step in loaded for failed in step.unreadable)
    assert {key for step in loaded for batch in step.packs for key in batch.keys}.isdisjoint(failed_keys)


def test_a_missing_manifest_or_credential_is_one_line_without_the_secret(server: FileServer) -> None:
    with pytest.raises(UserError, match=r"/nowhere/manifest\.json: cannot read \(no such file\).*emma-data index") as e:
        read_manifest(f"{server.url}/nowhere?sig=topsecret")
    assert "topsecret" not in str(e.value)
    server.fault = lambda number, path: "403"
    with pytest.raises(UserError, match="the server answers 403") as e:
        Planner(recipe_of(f"{server.url}?sig=topsecret"), tokenizer())
    assert "topsecret" not in str(e.value)


def test_an_index_that_is_missing_is_one_line(server: FileServer) -> None:
    server.fault = lambda number, path: "404" if "000001.idx" in path else ""
    with pytest.raises(UserError, match=r"shard-000001\.idx\.parquet: cannot be read: no such file"):
        Planner(recipe_of(server.url), tokenizer()).check()


def test_a_store_that_does_not_answer_for_an_index_is_no_fault_of_the_recipe(
    folder: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    planner = Planner(recipe_of(server.url, data__read_retries=1), tokenizer())
    server.fault = lambda number, path: "503" if ".idx" in path else ""
    with pytest.raises(RunError, match=r"\.idx\.parquet: cannot be read: the server answers 503 \(2 times\)"):
        planner.plan(1)
    server.fault = lambda number, path: ""  # the server answers again, and what failed is read once more
    assert planner.plan(1).digest == Planner(recipe_of(folder), tokenizer()).plan(1).digest


def test_requests_come_from_afar_too_and_only_those_asked_for(folder: Path, server: FileServer) -> None:
    data = tiny_recipe().data
    local = read_requests(folder, "it2i", data, 32, limit=2)
    server.gets.clear()
    remote = read_requests(server.url, "it2i", data, 32, limit=2)
    assert [(r.key, r.text, r.seed) for r in remote] == [(r.key, r.text, r.seed) for r in local]
    assert sum(".tar" in get for get in server.gets) == 2


def test_check_and_stats_read_a_remote_folder(
    folder: Path, server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{server.url}?sig=topsecret", "--workers", "1"]) == 0
    assert main(["stats", server.url]) == 0
    text = capsys.readouterr().out
    assert "as the index says" in text and "text tokens" in text and "topsecret" not in text
    copy = write_shards(tmp_path / "copy", every_task(12), per_shard=6)
    damage(copy / "shard-000001.tar", "q003.img0.png")
    server.folder = copy
    assert main(["check", server.url, "--workers", "1"]) == 1
    assert "record q003 differs from its crc32" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_cannot_be_written_ends_the_run_and_is_no_bad_sample(
    memory: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = recipe_of(memory, data__workers=workers, data__cache_dir=str(tmp_path), data__cache_gib=0.1)
    stream = Stream(recipe, 0, 1, None)
    stream.planner.check()
    monkeypatch.setattr(os, "replace", full)
    for copy in tmp_path.glob("*.tar"):
        copy.unlink()
    (loaded,) = stream.steps(1, STEPS)
    assert isinstance(loaded.failure, RunError)
    assert "cannot be written (No space left on device)" in str(loaded.failure)


def test_shards_of_a_window_are_fetched_before_they_are_read(memory: str, tmp_path: Path) -> None:
    """Shards of the next window too: planning the first step fetches more shards than it reads."""
    cache = tmp_path / "cache"
    recipe = recipe_of(
        memory, data__cache_dir=str(cache), data__cache_gib=0.1, data__shuffle_window=2, data__samples_per_step=6
    )
    first = {planned.url for slot in Planner(recipe, tokenizer()).plan(1).slots for planned in slot}
    assert len(first) < 6
    deadline = time.monotonic() + 30
    while len(list(cache.glob("*.tar"))) <= len(first):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    recipe.data.cache_dir, recipe.data.cache_gib = str(tmp_path / "small"), 1e-4
    Planner(recipe, tokenizer()).plan(1)
    assert not list((tmp_path / "small").glob("*.tar"))


def test_remote_latents_are_taken_like_local_ones(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="pip install 'emma-train[http]'")
    folder = write_shards(tmp_path / "set", every_task(12, side=64), per_shard=6)
    tiny = tiny_model().autoencoder
    cache_latents(folder, tiny, [ImageConfig(side=64)], torch.device("cpu"))
    mark = fingerprint(Path(tiny.path))
    with serving(folder) as server:
        near, far = (list(Stream(recipe_of(u, data__workers=2), 0, 1, mark).steps(1, 2)) for u in (folder, server.url))
    assert_same(near, far)
    assert all(pack.latents is not None for step in far for pack in step.packs)


def test_s3_is_read_through_its_usual_credentials(folder: Path) -> None:
    with s3_serving() as system:
        for path in folder.iterdir():
            system.pipe_file(f"bucket/set/{path.name}", path.read_bytes())
        assert_same(steps_of(recipe_of("s3://bucket/set", data__workers=2)), steps_of(recipe_of(folder)))
        with pytest.raises(UserError, match=r"s3://bucket/none/manifest\.json: cannot read \(no such file\)"):
            read_manifest("s3://bucket/none")
