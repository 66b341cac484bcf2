"""The state of the data in a checkpoint: what it holds, and how a stream goes on from it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.loader.loader import Stream
from emma_train.config.load import as_dict
from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from tests.helpers import tiny_recipe
from tests.shards import every_task, write_shards


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("resume") / "set", every_task(12), per_shard=10)


def recipe_of(folder: Path, **dotted: Any) -> Recipe:
    settings = {"data__slots": 6, "data__samples_per_step": 18, **dotted}
    return tiny_recipe(data__sources=[{"path": str(folder)}], **settings)


def test_state_is_small_and_other_shards_are_a_contradiction(small: Path, tmp_path: Path) -> None:
    stream = Stream(recipe_of(small), 0, 1, None)
    state = json.loads(json.dumps(stream.state(7)))
    assert state | {"sources": [], "pools": []} == {
        "schema": 3,
        "step": 7,
        "folders": stream.planner.folders,
        "sources": [],
        "pools": [],
        "tokens": {},
        "mix": {"i2t": 1, "t2i": 1, "it2i": 1},
    }
    assert {(pool["task"], pool["next"]) for pool in state["pools"]} == {("i2t", 42), ("t2i", 42), ("it2i", 42)}
    assert len(json.dumps(state)) < 1000
    stream.resume(state)
    Stream(recipe_of(small), 1, 3, None).resume(state)
    other = write_shards(tmp_path, every_task(13))
    with pytest.raises(UserError, match=r"data\.sources: the shards differ.*resume\.allow=\[data\.sources\]"):
        Stream(recipe_of(other), 0, 1, None).resume(state)
    Stream(recipe_of(other, resume__allow=["data.sources"]), 0, 1, None).resume(state)


OLD_STATE = {"schema": 2, "step": 7, "seed": 0}
OLD_TASKS = {"i2t": 42, "t2i": 42, "it2i": 42, "recon": 0}


def old_state(recipe: Recipe) -> dict[str, Any]:
    """The state of the data after 7 steps as version 0.1.0 wrote it."""
    tasks = {task: {"next": number, "left": [], "tokens": 0} for task, number in OLD_TASKS.items()}
    return {**OLD_STATE, "manifests": Stream(recipe, 0, 1, None).planner.fingerprint, "tasks": tasks}


def test_a_state_of_version_0_1_goes_on_at_its_positions(small: Path) -> None:
    recipe = recipe_of(small)
    straight, resumed = (Stream(recipe, 0, 1, None) for _ in range(2))
    resumed.resume(old_state(recipe), as_dict(recipe))
    assert resumed.state(7) == straight.state(7)
    assert [resumed.planner.plan(step) for step in (8, 9, 20)] == [straight.planner.plan(step) for step in (8, 9, 20)]


def test_a_state_of_version_0_1_goes_on_with_another_mix(small: Path) -> None:
    """Its positions are those in the sources and the mix of the checkpoint's config."""
    recipe = recipe_of(small)
    other = recipe_of(small, mix={"i2t": 1, "t2i": 2, "it2i": 0}, resume__allow=["mix"])
    resumed = Stream(other, 0, 1, None)
    resumed.resume(old_state(recipe), as_dict(recipe))
    expected = Stream(other, 0, 1, None)
    expected.resume(Stream(recipe, 0, 1, None).state(7))
    assert resumed.state(7) == expected.state(7)
    assert resumed.planner.plan(8) == expected.planner.plan(8)


def test_where_the_tasks_go_on_is_logged_if_a_change_was_accepted(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = Stream(recipe_of(small), 0, 1, None).state(1)
    with caplog.at_level(logging.INFO):
        caplog.clear()  # a test before may have let lines of this level through
        Stream(recipe_of(small), 0, 1, None).resume(state)
        assert caplog.messages == ["reading the shard indexes"]
        caplog.clear()
        Stream(recipe_of(small, data__seed=1, resume__allow=["data.seed"]), 0, 1, None).resume(state)
    assert caplog.messages[1:] == [
        f"{task} goes on in {small} at sample 6 of 12 in epoch 0" for task in ("i2t", "t2i", "it2i")
    ]
