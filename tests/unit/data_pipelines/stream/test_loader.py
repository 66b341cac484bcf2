"""Packs of a step are the same on any number of ranks and workers, and what cannot be read is left out and reported."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.stream.loader import StepBatches, Stream
from emma_train.config.errors import UserError
from emma_train.config.schema import Recipe
from emma_train.sequence.pack import PackedBatch
from tests.helpers import tiny_recipe
from tests.shards import damage, every_task, write_shards

SLOTS = 6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("loader") / "set", every_task(12), per_shard=10)


def recipe_of(folder: Path, **dotted: Any) -> Recipe:
    settings = {"data__slots": SLOTS, "data__samples_per_step": 18, **dotted}
    return tiny_recipe(data__sources=[{"path": str(folder)}], **settings)


def steps_of(recipe: Recipe, first: int, last: int, rank: int = 0, size: int = 1) -> list[StepBatches]:
    return list(Stream(recipe, rank, size, None).steps(first, last))


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    a, b = (dict(_leaves(dataclasses.asdict(batch))) for batch in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dictionaries and lists, by their path."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}/{key}")
    else:
        yield name, value


def assert_same_steps(one: list[StepBatches], other: list[StepBatches]) -> None:
    tables = [[(s.step, s.digest, s.straggler, s.bad) for s in steps] for steps in (one, other)]
    assert tables[0] == tables[1]
    for a, b in zip(one, other, strict=True):
        for pack, other_pack in zip(a.packs, b.packs, strict=True):
            assert_same(pack, other_pack)


def test_a_step_holds_its_slots_and_every_sample_of_the_plan(small: Path) -> None:
    recipe = recipe_of(small)
    stream = Stream(recipe, 0, 1, None)
    for data in stream.steps(1, 4):
        plan = stream.planner.plan(data.step)
        assert [batch.keys for batch in data.packs] == [[s.key for s in slot] for slot in plan.slots]
        assert (data.digest, data.straggler, data.bad) == (plan.digest, plan.straggler, [])


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
            assert_same(batch, ranks[slot % size][number].packs[slot // size])
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
def test_a_bad_sample_is_left_out_and_reported(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, every_task(6), per_shard=9)
    good = steps_of(recipe_of(folder), 1, 1)[0]
    damage(folder / "shard-000000.tar", "p001.img0.png")
    found = steps_of(recipe_of(folder, data__workers=workers), 1, 1)[0]
    assert [(bad.key, bad.task, bad.shard) for bad in found.bad] == [("p001", "t2i", "shard-000000.tar")]
    assert "crc32" in found.bad[0].reason
    assert sum(batch.num_skipped for batch in found.packs) == 1
    for before, after in zip(good.packs, found.packs, strict=True):
        assert after.keys == [key for key in before.keys if key != "p001"]
        if "p001" not in before.keys:
            assert_same(before, after)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slot_of_which_nothing_can_be_read_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, every_task(1))
    for member in ("q000.img0.png", "p000.img0.png", "e000.img0.png"):
        damage(folder / "shard-000000.tar", member)
    recipe = recipe_of(folder, data__slots=1, data__samples_per_step=3, data__workers=workers)
    with pytest.raises(UserError, match=r"^step 1: no sample of slot 0 can be read; the last: ") as caught:
        steps_of(recipe, 1, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_that_does_not_fit_is_one_clear_line(small: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"^step 1 packs \d+ tokens") as caught:
        steps_of(recipe_of(small, data__pack_tokens=20, data__workers=workers), 1, 1)
    assert "\n" not in str(caught.value)


def test_a_world_that_cannot_share_the_slots_is_refused_with_those_that_can(small: Path) -> None:
    with pytest.raises(UserError, match=r"data\.slots is 6, which 4 processes cannot share.*1, 2, 3, 6 processes"):
        Stream(recipe_of(small), 0, 4, None)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(small: Path) -> None:
    recipe = recipe_of(small)
    recipe.model.decoder.vocab = 100
    with pytest.raises(UserError, match=r"more than model\.decoder\.vocab=100"):
        Stream(recipe, 0, 1, None)


def test_state_is_small_and_other_shards_are_a_contradiction(small: Path, tmp_path: Path) -> None:
    stream = Stream(recipe_of(small), 0, 1, None)
    state = stream.state(7)
    assert state == {"schema": 1, "step": 7, "seed": 0, "manifests": stream.planner.fingerprint}
    stream.check_state(state)
    Stream(recipe_of(small), 1, 3, None).check_state(state)
    other = write_shards(tmp_path, every_task(13))
    with pytest.raises(UserError, match=r"data\.sources: the shards differ.*resume\.allow=\[data\.sources\]"):
        Stream(recipe_of(other), 0, 1, None).check_state(state)
    Stream(recipe_of(other, resume__allow=["data.sources"]), 0, 1, None).check_state(state)
