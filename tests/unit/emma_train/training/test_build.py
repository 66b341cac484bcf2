"""Weights that a stage starts with."""

from pathlib import Path

import pytest
import torch

from emma_train.model.emma import Emma
from emma_train.storage.paths import parse_path
from emma_train.training.build import load_previous_stage
from tests.helpers import recipe_values, tiny_model, tiny_recipe, write_export, write_recipe
from tests.runs import learnt, train


@pytest.mark.parametrize("gen_adapter", ["random", "und"])
def test_the_gen_adapter_starts_from_its_own_weights_or_from_the_und_adapter(tmp_path: Path, gen_adapter: str) -> None:
    before = write_export(tmp_path / "stage0", tiny_recipe("stage0")).state_dict()
    recipe = tiny_recipe("stage1", init__from=str(tmp_path / "stage0"), init__gen_adapter=gen_adapter)
    weights = {name: torch.zeros_like(value) for name, value in Emma(tiny_model()).state_dict().items()}
    load_previous_stage(weights, recipe, parse_path(tmp_path / "stage0"))
    for name, value in weights.items():
        copied = gen_adapter == "und" and name.startswith(("gen_adapter.norm.", "gen_adapter.fc"))
        assert torch.equal(value, before[name.replace("gen_adapter.", "und_adapter.") if copied else name]), name


@pytest.mark.parametrize("processes", [1, 2])
def test_pretraining_without_images_to_make_adds_up_gradients_over_micro_steps(tmp_path: Path, processes: int) -> None:
    settings = {"run__root": str(tmp_path), "train__steps": 2, "engine__precision": "bf16"}
    values = {**recipe_values("stage1", **settings), "mix": {"i2t": 1}}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    for reduce in ("true", "false"):
        train(recipe, f"run.name=reduce-{reduce}", f"engine.reduce_every_micro_step={reduce}", processes=processes)
    assert learnt(tmp_path / "reduce-true") == learnt(tmp_path / "reduce-false")
