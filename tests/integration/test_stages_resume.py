"""In every stage: a run that is interrupted twice ends like the uninterrupted one, bit for bit; on other numbers of
ranks it sees the same data, and its losses agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emma_train.checkpoint import dcp
from emma_train.checkpoint import folder as folders
from emma_train.model.parameter_groups import GROUPS
from emma_train.stages.stage import STAGES
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train, train_until

STEPS = 6
NAMES = list(STAGES)


def recipe_of(make_recipe: MakeRecipe, root: Path, name: str) -> Path:
    """A stage that starts from the uninterrupted run of the previous one, with averages and a schedule."""
    before = NAMES[NAMES.index(name) - 1] if name != NAMES[0] else None
    sections: dict[str, Any] = {"train": {"steps": STEPS, "save_every": 4, "log_every": 1}, "ema": {"decay": 0.9}}
    sections["schedule"] = {"kind": "cosine", "warmup_steps": 2, "min_ratio": 0.1}
    if before is not None:
        sections["init"] = {"from": str(root / before)}
    if name == "stage4_expert":
        sections["data"] = {"sources": [{"path": str(ASSETS / "emoji" / "train"), "require_tags": ["stem"]}]}
    return make_recipe(root, name, **sections)


@pytest.fixture(scope="module")
def recipes(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every stage, trained without interruption on one process."""
    root = tmp_path_factory.mktemp("stages")
    made = {name: recipe_of(make_recipe, root, name) for name in NAMES}
    for name, recipe in made.items():
        train(recipe, f"run.name={name}")
    return made


def meta(run: Path) -> dict[str, Any]:
    values = folders.read_valid_meta(checkpoint(run, STEPS))
    assert values is not None
    return values


@pytest.mark.parametrize("name", NAMES)
def test_two_interruptions_change_not_a_bit(recipes: dict[str, Path], name: str) -> None:
    recipe = recipes[name]
    run, straight = recipe.parent / f"{name}-twice", recipe.parent / name
    for stop in (2, 5):
        train_until(recipe, stop, f"run.name={run.name}")
        assert len(metrics(run)) == stop
    train(recipe, f"run.name={run.name}")
    assert learnt(run) == learnt(straight)
    one, other = stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))
    assert {tensor.split(".")[0] for tensor in one} == {"model", "optimizer", "ema"}
    assert differences(one, other) == []
    for key in ("data", "stage", "trainable", "parent", "frozen"):
        assert meta(run)[key] == meta(straight)[key], key
    assert meta(run)["done"] == {**meta(straight)["done"], "seconds": meta(run)["done"]["seconds"]}


@pytest.mark.parametrize("name", ["stage0", "stage4_expert", "stage4_router"])
def test_a_stage_that_trains_little_saves_little(recipes: dict[str, Path], name: str) -> None:
    run, full = recipes[name].parent / name, recipes["stage1"].parent / "stage1"
    prefixes = tuple(prefix for group in STAGES[name].trainable for prefix in GROUPS[group])
    (frozen,) = (run / "checkpoints" / "frozen").iterdir()
    for step in (4, STEPS):
        values = folders.read_valid_meta(checkpoint(run, step))
        assert values is not None and values["frozen"] == frozen.name
        names = dcp.tensor_names(checkpoint(run, step) / "weights")
        groups = {n.removeprefix("model.").removeprefix("ema.") for n in names}
        assert groups == {n for n in groups if n.startswith(prefixes)}
    assert not (full / "checkpoints" / "frozen").exists()
    assert sum(e["bytes"] for e in meta(run)["files"].values()) < sum(e["bytes"] for e in meta(full)["files"].values())


def test_what_is_saved_has_full_precision_where_frozen_weights_stay_gathered(recipes: dict[str, Path]) -> None:
    """Router tuning gathers units that backward never reaches; they could be saved gathered, and in bfloat16."""
    recipe = recipes["stage4_router"]
    settings = ("train.steps=2", "train.save_every=1", "engine.precision=bf16", "engine.reshard_after_forward=false")
    train(recipe, "run.name=gathered", *settings, processes=2)
    one = stored(checkpoint(recipe.parent / "gathered", 1))
    source = stored(checkpoint(recipe.parent / "stage4_expert", STEPS))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    for name in (n for n in one if n.startswith("model.") and not n.startswith("model.vision.router.")):
        averaged = source.get(name.replace("model.", "ema.", 1), source[name])
        assert torch.equal(one[name], averaged), name


def test_the_number_of_ranks_may_change_at_every_start(recipes: dict[str, Path]) -> None:
    """4, 2, 3 and 1 ranks, which all divide the twelve slots."""
    recipe, settings = recipes["stage1"], ("data.slots=12", "train.keep=9")
    straight, run = recipe.parent / "one", recipe.parent / "ranks"
    train(recipe, f"run.name={straight.name}", *settings)
    for ranks, stop in ((4, 1), (2, 3), (3, 5)):
        train_until(recipe, stop, f"run.name={run.name}", *settings, processes=ranks)
    train(recipe, f"run.name={run.name}", *settings)
    sizes = [(folders.read_valid_meta(checkpoint(run, step)) or {})["world_size"] for step in (1, 3, 5, 6)]
    assert sizes == [4, 2, 3, 1]
    for one, other in zip(metrics(run), metrics(straight), strict=True):
        assert one["data/digest"] == other["data/digest"]
        for key in ("loss", "loss/i2t", "loss/t2i", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), (one["step"], key)
