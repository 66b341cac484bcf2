"""Router tuning needs images with a label: where the index shows that there are none, training does not start."""

from pathlib import Path

import pytest

from data_pipelines.planner.planner import Planner
from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from tests.helpers import tiny_recipe, tokenizer
from tests.shards import question, write_shards


def recipe_of(folder: Path, untagged: str, tags: list[list[str]], **source: list[str]) -> Recipe:
    """Router tuning on eight records for each list of tags."""
    contents = [question(f"q{i}-{j}", tags=names) for i, names in enumerate(tags) for j in range(8)]
    path = str(write_shards(folder, contents, per_shard=5))
    return tiny_recipe("stage4_router", data__sources=[{"path": path, **source}], data__untagged=untagged)


@pytest.mark.parametrize("tags", [[["photo"], []], [["stem"], ["photo"]]])
def test_images_without_a_label_are_refused_with_their_source(tags: list[list[str]], tmp_path: Path) -> None:
    planner = Planner(recipe_of(tmp_path, "unknown", tags, exclude_tags=["stem"]), tokenizer())
    with pytest.raises(UserError, match=f"^no image of {tmp_path} has the tag stem or general, and data.untagged is"):
        planner.check_labels()


def test_one_label_is_enough_and_untagged_images_may_count_as_general(tmp_path: Path) -> None:
    Planner(recipe_of(tmp_path / "a", "unknown", [["photo"], ["general", "photo"]]), tokenizer()).check_labels()
    Planner(recipe_of(tmp_path / "b", "unknown", [["photo"], ["stem"]]), tokenizer()).check_labels()
    Planner(recipe_of(tmp_path / "c", "general", [["photo"]]), tokenizer()).check_labels()
