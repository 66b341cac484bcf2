"""The task recon is planned from the index rows of t2i: no new index, and its tokens are counted as they will be."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.loader.reader import SampleReader
from data_pipelines.planner.planner import Planner
from emma_train.config.schema import Recipe
from emma_train.sequence.pack import pack
from tests.helpers import PATCH, SHUFFLE, tiny_recipe, tokenizer
from tests.shards import every_task, write_shards

SHARES = {"i2t": 1, "t2i": 1, "it2i": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), every_task(12))


def recipe_of(folder: Path, mix: dict[str, int]) -> Recipe:
    data: dict[str, Any] = {
        "sources": [{"path": str(folder)}],
        "slots": 1,
        "samples_per_step": 4 * len(mix),
        "pack_tokens": 10**6,
    }
    data |= {"text_dropout": 0.0, "reference_dropout": 0.0}
    shares = {**dict.fromkeys(SHARES, 0), **mix}
    return tiny_recipe(mix=shares, **{f"data__{key}": value for key, value in data.items()})


def test_its_samples_are_those_of_t2i_with_the_planned_tokens(folder: Path) -> None:
    recipe = recipe_of(folder, {"recon": 1})
    (slot,) = Planner(recipe, tokenizer()).plan(1).slots
    reader = SampleReader(recipe.data, tokenizer(), PATCH, SHUFFLE, None)
    samples = [reader.read(ref) for ref in slot]
    assert {ref.task for ref in slot} == {"recon"} and all(ref.key.startswith("p") for ref in slot)
    assert [sample.num_tokens for sample in samples] == [ref.num_tokens for ref in slot]
    batch = pack(samples)
    assert batch.counts[1] == batch.counts[3] == sum(ref.num_visual for ref in slot)
    assert batch.num_target_tokens == {"recon": batch.counts[3]}


def test_the_share_of_recon_does_not_change_the_samples_of_other_tasks(folder: Path) -> None:
    without, with_recon = recipe_of(folder, SHARES), recipe_of(folder, {**SHARES, "recon": 1})
    keys = [
        [(ref.task, ref.key, ref.alternative) for slot in Planner(r, tokenizer()).plan(2).slots for ref in slot]
        for r in (without, with_recon)
    ]
    assert sorted(keys[0]) == sorted(ref for ref in keys[1] if ref[0] != "recon")


def test_a_state_that_does_not_know_the_task_goes_on(folder: Path) -> None:
    planner = Planner(recipe_of(folder, {**SHARES, "recon": 1}), tokenizer())
    without = Planner(recipe_of(folder, SHARES), tokenizer())
    planner.load(1, without.state(1))
    pools = {pool["task"]: pool["next"] for pool in planner.state(2)["pools"]}
    assert pools == {"i2t": 8, "t2i": 8, "it2i": 8, "recon": 4}
