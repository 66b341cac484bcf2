"""Held-out packs: the same samples on any number of ranks, each once, with fixed noise and without dropout."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.loader.held_out import read_validation_batches
from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.validation_batches import RankPacks
from tests.helpers import assert_same_pack, tiny_recipe
from tests.shards import edit, every_task, prompt, question, write_shards

TASKS = {"i2t": "q", "t2i": "p", "it2i": "e"}
"""Task, and first letter of the keys of its records."""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("held_out") / "set", every_task(12), per_shard=10)


def recipe_of(split: Path, **dotted: Any) -> Recipe:
    sources = [{"path": str(split)}]
    settings = {"validate__every": 2, "validate__sources": sources, "validate__questions": sources, **dotted}
    return tiny_recipe(data__pack_tokens=64, **settings)


def keys(packs: RankPacks) -> list[str]:
    """Task and key of each sample that counts."""
    return [
        f"{task} {key}"
        for batch in packs.packs[: packs.num_counted]
        for task, key in zip(batch.tasks, batch.keys, strict=True)
    ]


def test_every_sample_of_a_small_split_is_taken_once(split: Path) -> None:
    batches = read_validation_batches(recipe_of(split), 0, 1, None)
    wanted = [f"{task} {letter}{n:03d}" for task, letter in TASKS.items() for n in range(12)]
    assert sorted(keys(batches.samples)) == sorted(wanted)
    assert sorted(keys(batches.questions)) == sorted(wanted[:12])
    assert len(batches.samples.packs) == batches.samples.num_counted > 3


@pytest.mark.parametrize("size", [2, 7, 20])
def test_ranks_divide_the_packs_and_run_equally_many(split: Path, size: int) -> None:
    recipe = recipe_of(split)
    alone = read_validation_batches(recipe, 0, 1, None)
    ranks = [read_validation_batches(recipe, rank, size, None) for rank in range(size)]
    assert {rank.digest for rank in ranks} == {alone.digest}
    for part in ("samples", "questions"):
        every, parts = getattr(alone, part), [getattr(rank, part) for rank in ranks]
        assert len({len(packs.packs) for packs in parts}) == 1
        assert sum(packs.num_counted for packs in parts) == len(every.packs)
        for number, batch in enumerate(every.packs):
            assert_same_pack(batch, parts[number % size].packs[number // size])


def test_fewer_samples_are_the_first_of_more(split: Path) -> None:
    more = keys(read_validation_batches(recipe_of(split), 0, 1, None).questions)
    fewer = read_validation_batches(recipe_of(split, validate__num_questions=5, validate__num_samples=3), 0, 1, None)
    assert keys(fewer.questions) == more[:5]
    assert len(keys(fewer.samples)) == 9


def test_noise_and_time_come_from_the_key_alone_and_no_condition_is_dropped(split: Path) -> None:
    """As training draws them with data.seed 0 in its first epoch; data.seed and dropout of the recipe do not matter."""
    settings = {"data__text_dropout": 1.0, "data__reference_dropout": 1.0}
    one, other = (
        read_validation_batches(recipe_of(split, data__seed=seed, **settings), 0, 1, None).samples.packs
        for seed in (0, 7)
    )
    for batch, same in zip(one, other, strict=True):
        assert_same_pack(batch, same)
        if batch.target_tasks:
            assert batch.noise_seeds.tolist() == [seed_of(0, 0, key, "noise") for key in batch.keys]
            assert batch.time_seeds.tolist() == [seed_of(0, 0, key, "time") for key in batch.keys]
        if batch.tasks[0] == "it2i":
            assert batch.counts[2] == batch.counts[3] > 0


def test_tasks_are_those_of_the_mix_and_understanding(split: Path) -> None:
    batches = read_validation_batches(recipe_of(split, mix={"t2i": 1}), 0, 1, None)
    assert {key.split()[0] for key in keys(batches.samples)} == {"t2i", "i2t"}
    assert keys(read_validation_batches(recipe_of(split), 0, 1, None, ask=False).questions) == []


def test_an_entry_takes_its_tasks_and_tags(tmp_path: Path) -> None:
    questions = [question("q000", tags=["stem"]), question("q001"), question("q002", tags=["stem"])]
    folder = write_shards(tmp_path / "one", [*questions, prompt("p000"), edit("e000")])
    other = write_shards(tmp_path / "two", [question("q900"), prompt("p900")])
    sources = [{"path": str(folder), "tasks": ["i2t"], "require_tags": ["stem"]}, {"path": str(other)}]
    batches = read_validation_batches(recipe_of(folder, validate__sources=sources), 0, 1, None)
    assert sorted(keys(batches.samples)) == ["i2t q000", "i2t q002", "i2t q900", "t2i p900"]


def test_a_folder_that_is_missing_or_lacks_its_task_is_named_with_its_key(split: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^validate\.sources\[1\]: .*nowhere"):
        read_validation_batches(
            recipe_of(split, validate__sources=[{"path": str(split)}, {"path": str(tmp_path / "nowhere")}]), 0, 1, None
        )
    prompts = write_shards(tmp_path / "prompts", [prompt("p000")])
    with pytest.raises(UserError, match=r"^validate\.questions: .*no sample of .*prompts has"):
        read_validation_batches(
            recipe_of(split, validate__questions=[{"path": str(prompts), "tasks": ["i2t"]}]), 0, 1, None
        )
