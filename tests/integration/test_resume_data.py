"""What a user changes about the data of a run in its middle: the samples go on, and a line says where."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, learnt, train
from tests.shards import every_task, write_shards


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, whose data are in the folder `data` beside it."""
    root = tmp_path_factory.mktemp("data-changes")
    data = {"slots": 2, "samples_per_step": 8, "und": {"side": 64}, "gen": {"side": 64}}
    data["sources"] = [{"path": str(write_shards(root / "data", every_task(40), per_shard=25))}]
    mix = {"i2t": 1, "t2i": 1}
    path = make_recipe(root, data=data, mix=mix, train={"steps": 3, "save_every": 3, "log_every": 1})
    train(path, "run.name=begun")
    return path


def copy_of(recipe: Path, name: str) -> Path:
    """Another run folder with the same checkpoint."""
    shutil.copytree(recipe.parent / "begun", recipe.parent / name)
    return recipe.parent / name


def positions(run: Path, step: int) -> dict[str, int]:
    """The next position of each task's pool in a checkpoint."""
    pools: list[dict[str, Any]] = json.loads((checkpoint(run, step) / "meta.json").read_text())["data"]["pools"]
    return {pool["task"]: pool["next"] for pool in pools}


@pytest.mark.parametrize(
    ("allow", "change", "expected"),
    [
        ("mix", "mix={i2t: 1, t2i: 3}", {"i2t": 12 + 4, "t2i": 12 + 12}),
        ("data.samples_per_step", "data.samples_per_step=4", {"i2t": 12 + 4, "t2i": 12 + 4}),
        ("data.samples_per_step", "data.samples_per_step=16", {"i2t": 12 + 16, "t2i": 12 + 16}),
    ],
)
def test_an_accepted_change_goes_on_at_the_positions_of_the_checkpoint(
    recipe: Path, allow: str, change: str, expected: dict[str, int]
) -> None:
    name = f"changed-{expected['i2t']}-{expected['t2i']}"
    run = copy_of(recipe, name)
    (outcome,) = train(recipe, f"run.name={name}", "train.steps=5", change, code=2)
    (line,) = outcome.error_lines
    assert f"resume.allow=[{allow}" in line
    (outcome,) = train(recipe, f"run.name={name}", "train.steps=5", change, f"resume.allow=[{allow}]")
    assert positions(recipe.parent / "begun", 3) == {"i2t": 12, "t2i": 12}
    assert positions(run, 5) == expected
    assert f"accepted: {allow}" in outcome.err
    assert f"t2i goes on in {recipe.parent / 'data'} at sample 12 of 40 in epoch 0" in outcome.err


def test_moved_shards_are_the_same_and_others_are_not(recipe: Path) -> None:
    run, moved = copy_of(recipe, "moved"), recipe.parent / "elsewhere"
    shutil.copytree(recipe.parent / "data", moved)
    train(recipe, "run.name=moved", "train.steps=5", f"data.sources=[{{path: {moved}}}]")
    straight = copy_of(recipe, "straight")
    train(recipe, "run.name=straight", "train.steps=5")
    assert learnt(run) == learnt(straight)
    other = write_shards(recipe.parent / "other", every_task(39))
    (outcome,) = train(recipe, "run.name=moved", "train.steps=6", f"data.sources=[{{path: {other}}}]", code=2)
    (line,) = outcome.error_lines
    assert "data.sources: the shards differ from those of the checkpoint" in line


def test_all_contradictions_and_mistyped_keys_are_named_at_once(recipe: Path) -> None:
    copy_of(recipe, "typo")
    changes = ("train.steps=5", "optimizer.lr=5.0e-4", "data.seed=7", "mix={i2t: 1, t2i: 3}")
    (outcome,) = train(recipe, "run.name=typo", *changes, code=2)
    (line,) = outcome.error_lines
    assert "resume.allow=[data.seed,mix.t2i,optimizer.lr]" in line
    (outcome,) = train(recipe, "run.name=typo", *changes, "resume.allow=[optimizer.lrr]", code=2)
    (line,) = outcome.error_lines
    assert "resume.allow names 'optimizer.lrr'" in line and "did you mean optimizer.lr?" in line
    (outcome,) = train(recipe, "run.name=typo", *changes, "resume.allow=[data.seed,mix,optimizer.lr]")
    assert outcome.err.count("accepted: ") == 3


@pytest.mark.parametrize("damage", ["flipped bit", "null", "listed twice"])
def test_a_damaged_index_or_manifest_ends_the_run_with_one_line(recipe: Path, damage: str) -> None:
    data = recipe.parent / f"damaged-{damage.replace(' ', '-')}"
    shutil.copytree(recipe.parent / "data", data)
    manifest = json.loads((data / "manifest.json").read_text())
    if damage == "flipped bit":
        for index in data.glob("*.idx.parquet"):
            content = bytearray(index.read_bytes())
            content[len(content) // 3] ^= 1
            index.write_bytes(content)
    elif damage == "null":
        (data / "manifest.json").write_text("null")
    else:
        (data / "manifest.json").write_text(json.dumps({**manifest, "shards": manifest["shards"] * 2}))
    (outcome,) = train(recipe, "run.name=damaged", f"data.sources=[{{path: {data}}}]", code=2)
    (line,) = outcome.error_lines
    expected = {"flipped bit": "content differs from its sha256", "null": "is null", "listed twice": "twice"}
    assert expected[damage] in line
