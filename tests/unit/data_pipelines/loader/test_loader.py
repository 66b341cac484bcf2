"""Packs do not depend on the number of ranks and workers; unreadable samples are replaced or dropped, and reported."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.loader.loader import MAX_SUBSTITUTES, StepBatches, Stream, as_run_error, dead_worker
from data_pipelines.shards import images as images
from data_pipelines.shards import latents
from data_pipelines.shards.encode_latents import cache_latents
from emma_train.config.schema import ImageConfig, Recipe
from emma_train.errors import RunError, UserError
from emma_train.model.autoencoder import fingerprint
from tests.helpers import assert_same_pack, tiny_model, tiny_recipe
from tests.shards import Content, damage, every_task, prompt, write_shards

SLOTS = 6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("loader") / "set", every_task(12), per_shard=10)


def recipe_of(folder: Path, **dotted: Any) -> Recipe:
    settings = {"data__slots": SLOTS, "data__samples_per_step": 18, **dotted}
    return tiny_recipe(data__sources=[{"path": str(folder)}], **settings)


def steps_of(recipe: Recipe, first: int, last: int, rank: int = 0, size: int = 1) -> list[StepBatches]:
    return list(Stream(recipe, rank, size, None).steps(first, last))


def assert_same_steps(one: list[StepBatches], other: list[StepBatches]) -> None:
    tables = [[(s.step, s.digest, s.straggler, s.unreadable) for s in steps] for steps in (one, other)]
    assert tables[0] == tables[1]
    for a, b in zip(one, other, strict=True):
        for pack, other_pack in zip(a.packs, b.packs, strict=True):
            assert_same_pack(pack, other_pack)


def test_a_step_holds_its_slots_and_every_sample_of_the_plan(small: Path) -> None:
    recipe = recipe_of(small)
    stream = Stream(recipe, 0, 1, None)
    for data in stream.steps(1, 4):
        plan = stream.planner.plan(data.step)
        assert [batch.keys for batch in data.packs] == [[s.key for s in slot] for slot in plan.slots]
        assert (data.digest, data.straggler, data.unreadable) == (plan.digest, plan.straggler, [])


def test_two_worker_processes_give_the_packs_of_none_bit_for_bit(small: Path) -> None:
    assert_same_steps(
        steps_of(recipe_of(small), 1, 4), steps_of(recipe_of(small, data__workers=2, data__prefetch=2), 1, 4)
    )


@pytest.mark.parametrize("size", [2, 3, 6])
def test_several_ranks_together_are_one_rank_alone(small: Path, size: int) -> None:
    alone = steps_of(recipe_of(small), 1, 3)
    ranks = [steps_of(recipe_of(small), 1, 3, rank, size) for rank in range(size)]
    for number, data in enumerate(alone):
        for slot, batch in enumerate(data.packs):
            assert_same_pack(batch, ranks[slot % size][number].packs[slot // size])
        assert {data.digest} == {steps[number].digest for steps in ranks}
        assert all(len(steps[number].packs) == SLOTS // size for steps in ranks)


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_later_gives_the_later_steps(small: Path, workers: int) -> None:
    recipe = recipe_of(small, data__workers=workers)
    assert_same_steps(steps_of(recipe, 3, 5), steps_of(recipe, 1, 5)[2:])


def test_leaving_a_stream_early_ends_its_thread(small: Path) -> None:
    import threading

    steps = Stream(recipe_of(small), 0, 1, None).steps(1, 10**6)
    assert next(steps).step == 1
    steps.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_its_first_substitute_that_can_be_read(tmp_path: Path, workers: int) -> None:
    """The sample and its first substitute are broken: the second substitute replaces it, and nothing else moves."""
    folder = write_shards(tmp_path, every_task(6), per_shard=9)
    recipe = recipe_of(folder, data__workers=workers)
    good = steps_of(recipe_of(folder), 1, 1)[0]
    planner = Stream(recipe, 0, 1, None).planner
    planned = next(s for slot in planner.plan(1).slots for s in slot if s.key == "p001")
    substitutes = list(
        dict.fromkeys(substitute.key for i in range(8) if (substitute := planner.substitute(planned, i)))
    )
    assert len(substitutes) > 1
    for key in ("p001", substitutes[0]):
        damage(folder / ("shard-000000.tar" if int(key[1:]) < 3 else "shard-000001.tar"), f"{key}.img0.png")
    loaded = steps_of(recipe, 1, 1)[0]
    with_same_substitute = [failed for failed in loaded.unreadable if failed.replaced_by == substitutes[1]]
    assert [(failed.key, failed.task) for failed in with_same_substitute][0] == ("p001", "t2i")
    assert {failed.key for failed in with_same_substitute} == {"p001", substitutes[0]}
    assert all("crc32" in failed.reason and failed.shard.startswith("shard-00000") for failed in loaded.unreadable)
    # The broken substitute is a sample of the step too, and has substitutes of its own.
    assert (loaded.dropped, loaded.replaced) == (0, 2)
    for before, after in zip(good.packs, loaded.packs, strict=True):
        broken = {"p001", substitutes[0]} & set(before.keys)
        assert len(after.keys) == len(before.keys)
        assert after.num_tokens <= before.num_tokens
        if not broken:
            assert_same_pack(before, after)
        elif "p001" in broken:
            assert after.keys[before.keys.index("p001")] == substitutes[1]
    assert loaded.digest == good.digest


RESUMED = [(1, 0), (1, 4), (2, 1), (4, 2), (3, 3), (6, 0)]
"""(ranks, workers) that continue a run of two ranks with two workers each."""


def ranks_of(
    recipe: Recipe, size: int, first: int, last: int, state: dict[str, Any] | None
) -> tuple[list[StepBatches], dict[str, Any]]:
    """Steps of all ranks together, each with a stream of its own, packs in the order of the slots; and the state after
    them, which every rank agrees on."""
    together: list[list[StepBatches]] = []
    states = []
    for rank in range(size):
        stream = Stream(recipe, rank, size, None)
        if state is not None:
            stream.resume(state)
        together.append(list(stream.steps(first, last)))
        states.append(json.loads(json.dumps(stream.state(last))))
    assert all(other == states[0] for other in states)
    packs = [[step[n % size].packs[n // size] for n in range(12)] for step in zip(*together, strict=True)]
    return [
        dataclasses.replace(one, packs=packs_of_step) for one, packs_of_step in zip(together[0], packs, strict=True)
    ], states[0]


def elastic(folder: Path, workers: int) -> Recipe:
    """Filled packs with dropout of text and references, so that everything random is tested."""
    return recipe_of(
        folder,
        data__slots=12,
        data__samples_per_step=0,
        data__pack_tokens=120,
        data__workers=workers,
        data__text_dropout=0.3,
        data__reference_dropout=0.3,
    )


@pytest.fixture(scope="module")
def straight(small: Path) -> list[StepBatches]:
    return ranks_of(elastic(small, 0), 1, 1, 6, None)[0]


@pytest.fixture(scope="module")
def begun(small: Path, straight: list[StepBatches]) -> dict[str, Any]:
    """The state after two steps on two ranks with two workers each."""
    steps, state = ranks_of(elastic(small, 2), 2, 1, 2, None)
    assert_same_steps(steps, straight[:2])
    return state


@pytest.mark.seconds
@pytest.mark.parametrize(("size", "workers"), RESUMED)
def test_a_run_goes_on_bit_for_bit_on_other_ranks_and_workers(
    small: Path, straight: list[StepBatches], begun: dict[str, Any], size: int, workers: int
) -> None:
    """Steps 1 and 2 on two ranks with two workers, 3 and 4 on others, 5 and 6 on one alone."""
    steps, state = ranks_of(elastic(small, workers), size, 3, 4, begun)
    assert_same_steps(steps, straight[2:4])
    assert_same_steps(ranks_of(elastic(small, 0), 1, 5, 6, state)[0], straight[4:])


@pytest.mark.slow
@pytest.mark.timeout(900)  # an example of up to three worlds takes up to 20 seconds
@settings(deadline=None, max_examples=8)
@given(
    sizes=st.lists(st.sampled_from([1, 1, 2, 5, 17]), min_size=1, max_size=4),
    num=st.integers(3, 8),
    mix=st.sampled_from([(1, 1, 1), (3, 1, 2), (0, 1, 0), (1, 0, 4)]),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 12])] * 3),
    filled=st.booleans(),
    stops=st.tuples(st.integers(1, 3), st.integers(4, 6)),
)
def test_whatever_the_shards_the_mix_and_the_ranks_a_run_is_the_same(
    sizes: list[int], num: int, mix: tuple[int, int, int], worlds: list[int], filled: bool, stops: tuple[int, int]
) -> None:
    """Shards of one sample, fewer shards than ranks, epochs of a step or less; three worlds one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), every_task(num), per_shard=sizes)
        count = 0 if filled else 12 * sum(mix)
        recipe = elastic(Path(folder), 0)
        recipe.mix.i2t, recipe.mix.t2i, recipe.mix.it2i = mix
        recipe.data.samples_per_step, recipe.data.pack_tokens = count, 120 if filled else 2000
        alone, _ = ranks_of(recipe, 1, 1, 7, None)
        together: list[StepBatches] = []
        state = None
        for world, first, last in zip(worlds, (1, *(s + 1 for s in stops)), (*stops, 7), strict=True):
            steps, state = ranks_of(recipe, world, first, last, state)
            together += steps
        assert_same_steps(together, alone)
        for step in alone:
            tasks = Counter(key[0] for batch in step.packs for key in batch.keys)
            assert len({Fraction(tasks[letter], share) for letter, share in zip("qpe", mix, strict=True) if share}) == 1


def broken(kind: str, content: Content) -> Content:
    """A record that can be indexed but not used."""
    key, record, parts = content
    if kind == "half an image":
        parts = {**parts, "img0.png": parts["img0.png"][:1500]}
    return key, record, parts


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("half an image", "OSError: .*truncated"),
        ("a flipped byte", "bytes differ from the index's crc32"),
        ("a bomb", r"ValueError: an image of 64 x 64 pixels, more than 1,024"),
    ],
)
def test_each_kind_of_bad_sample_is_replaced_and_told(
    tmp_path: Path, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [prompt(f"p{i:03d}") for i in range(12)]
    contents[5] = broken(kind, contents[5] if kind != "a bomb" else prompt("p005", side=64))
    folder = write_shards(tmp_path, contents)
    if kind == "a flipped byte":
        damage(folder / "shard-000000.tar", "p005.img0.png", 1)
    if kind == "a bomb":  # indexed while it was allowed
        monkeypatch.setattr(images, "MAX_PIXELS", 1024)
    mix = {"i2t": 0, "t2i": 1, "it2i": 0}
    (loaded,) = steps_of(recipe_of(folder, mix=mix, data__samples_per_step=12), 1, 1)
    (failed,) = loaded.unreadable
    assert (failed.key, failed.task, failed.shard) == ("p005", "t2i", "shard-000000.tar")
    assert re.search(reason, failed.reason)
    keys = [key for batch in loaded.packs for key in batch.keys]
    assert "p005" not in keys and len(keys) == 12
    assert keys.count(str(failed.replaced_by)) == 2
    assert (loaded.replaced, loaded.dropped) == (1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_without_a_readable_spare_is_left_out(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, every_task(6))
    for number in range(6):
        damage(folder / "shard-000000.tar", f"p{number:03d}.img0.png")
    loaded = steps_of(recipe_of(folder, data__workers=workers), 1, 1)[0]
    assert (loaded.dropped, loaded.replaced) == (6, 0)
    assert all("t2i" not in batch.tasks and batch.num_dropped == 1 for batch in loaded.packs)
    assert all(failed.replaced_by is None for failed in loaded.unreadable)
    # Each tried its substitutes, at most eight: no sample is asked for in vain for ever.
    assert 6 * 2 <= len(loaded.unreadable) <= 6 * (1 + MAX_SUBSTITUTES)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slot_of_which_nothing_can_be_read_is_a_failure_of_that_step(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, every_task(1))
    for member in ("q000.img0.png", "p000.img0.png", "e000.img0.png"):
        damage(folder / "shard-000000.tar", member)
    recipe = recipe_of(folder, data__slots=1, data__samples_per_step=3, data__workers=workers)
    (loaded,) = steps_of(recipe, 1, 5)
    assert (loaded.step, loaded.packs) == (1, [])
    assert isinstance(loaded.failure, RunError)
    assert re.match(
        r"^step 1: no sample of slot 0 can be read, nor a substitute; the last: [^\n]*$", str(loaded.failure)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_that_does_not_fit_is_one_clear_line(small: Path, workers: int) -> None:
    """A new run fails before its model is built. A later step that cannot be packed ends the run when it is reached."""
    stream = Stream(recipe_of(small, data__pack_tokens=50, data__workers=workers), 0, 1, None)
    message = r"^step 1 packs \d+ tokens into one slot[^\n]*$"
    with pytest.raises(UserError, match=message):
        stream.planner.check()
    (loaded,) = stream.steps(1, 3)
    assert isinstance(loaded.failure, UserError) and re.match(message, str(loaded.failure))


def test_a_worker_that_is_killed_is_a_failure_and_no_hang(small: Path) -> None:
    """As when the kernel kills a process for memory: torch notices it, and the error is one line."""
    steps = Stream(recipe_of(small, data__workers=2, data__prefetch=1), 0, 1, None).steps(1, 10**6)
    assert next(steps).failure is None
    children = multiprocessing.active_children()
    os.kill(children[0].pid, signal.SIGKILL)  # type: ignore[arg-type]
    started = time.monotonic()
    try:
        loaded = next(data for data in steps if data.failure)
        error = loaded.failure
    except RuntimeError as raised:  # torch raises from a signal handler, so it may come between two steps
        error = dead_worker(raised)
    assert time.monotonic() - started < 20
    # Which of torch's watches sees it first is a matter of luck.
    assert re.search(
        r"DataLoader worker .*(killed by signal|exited unexpectedly|died).*\. A kill is mostly", str(error)
    )
    assert "\n" not in str(error)


def test_a_bug_is_not_taken_for_a_dead_worker() -> None:
    assert dead_worker(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshape")) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("as it is"), "as it is"),
        (ConnectionResetError(), "a DataLoader worker died"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "step 3: /dev/shm is full"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "docker run --shm-size"),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "step 3: this process has too many files open",
        ),
        (MemoryError(), "step 3: this machine or container has no memory left"),
        (RuntimeError("DataLoader timed out after 5 seconds"), "sent no pack within engine.step_timeout_s"),
        (KeyError("x"), "step 3: the loader failed: KeyError: 'x'"),
    ],
)
def test_what_fails_in_the_loader_becomes_one_line(error: Exception, message: str) -> None:
    failure = as_run_error(error, 3)
    assert message in str(failure) and "\n" not in str(failure)
    assert isinstance(failure, RunError) and failure.__context__ is None


@pytest.mark.seconds
def test_a_request_to_stop_does_not_reach_the_workers(small: Path) -> None:
    """A scheduler signals every process of a job; the trainer still needs packs for the current step."""
    steps = Stream(recipe_of(small, data__workers=2), 0, 1, None).steps(1, 60)
    next(steps)
    for child in multiprocessing.active_children():
        for name in ("TERM", "USR1", "INT"):
            subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)  # by another than the trainer
    assert [data.step for data in steps if data.failure is None] == list(range(2, 61))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_of_which_only_some_latents_are_cached_encodes_all(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """If one image has no latent, all images of the pack are decoded, targets too, and a warning says so once."""
    folder = write_shards(tmp_path, every_task(12, side=64), per_shard=18)
    tiny = tiny_model().autoencoder
    cache_latents(folder, tiny, [ImageConfig(side=64)], torch.device("cpu"))
    mark = fingerprint(Path(tiny.path))
    recipe = recipe_of(folder, data__workers=workers)
    plain = [batch for step in Stream(recipe, 0, 1, None).steps(1, 2) for batch in step.packs]
    cached = [batch for step in Stream(recipe, 0, 1, mark).steps(1, 2) for batch in step.packs]
    assert all(batch.latents is not None for batch in cached)
    (folder / "shard-000001.square-64.latents.safetensors").unlink()
    latents._read_table.cache_clear()
    mixed = [batch for step in Stream(recipe, 0, 1, mark).steps(1, 2) for batch in step.packs]
    kinds = {batch.latents is None for batch in mixed}
    assert True in kinds
    if workers == 0:
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "step 1: all images of a pack are encoded, because some of i2t" in warning
    for batch, with_none, with_all in zip(mixed, plain, cached, strict=True):
        assert_same_pack(batch, with_none if batch.latents is None else with_all)


def test_a_world_that_cannot_share_the_slots_is_refused_with_those_that_can(small: Path) -> None:
    with pytest.raises(UserError, match=r"data\.slots is 6, which 4 processes cannot share.*1, 2, 3, 6 processes"):
        Stream(recipe_of(small), 0, 4, None)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(small: Path) -> None:
    recipe = recipe_of(small)
    recipe.model.decoder.vocab = 100
    with pytest.raises(UserError, match=r"more than model\.decoder\.vocab=100"):
        Stream(recipe, 0, 1, None)
