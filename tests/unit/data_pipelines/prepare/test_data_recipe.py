"""Recipes of data: words, variables, what is left out, where a run goes on; and those of the repository."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.cli import build_parser, main
from data_pipelines.commands.run import parse_step
from data_pipelines.prepare.data_recipe import DataRecipe, load_data_recipe, run_steps
from data_pipelines.prepare.operator import OPERATORS, load_operator
from emma_train.errors import UserError

ROOT = Path(__file__).parents[4]
RECIPES = sorted((ROOT / "recipes" / "data").glob("*.yaml"))


def write(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump({"out": "data/set", "steps": ["check {out}"], **values}))
    return path


def test_variables_and_words_with_spaces(tmp_path: Path) -> None:
    steps = ["import folder {source} {out} --tokenizer t", {"if": "more", "do": "stats {more}"}, "check {out} {more}"]
    path = write(tmp_path / "r.yaml", variables={"source": None, "more": ""}, steps=steps)
    recipe = load_data_recipe(path, {"source": "my images"})
    assert recipe.steps == (
        ("import", "folder", "my images", "data/set", "--tokenizer", "t"),
        ("check", "data/set"),
    )
    assert load_data_recipe(path, {"more": "x"}).steps[1] == ("stats", "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": ["check {nothing}"]}, "step 1: there is no variable nothing; there are out"),
        ({"steps": [{"do": "check x", "if": "nothing"}]}, "step 1: must be a text, or"),
        ({"steps": ["check 'x"]}, "step 1: No closing quotation"),
        ({"steps": []}, "has no steps"),
        ({"stages": []}, "must have the keys variables, out and steps"),
    ],
)
def test_wrong_recipes_are_one_line(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_data_recipe(write(tmp_path / "r.yaml", **values), {})


def test_a_step_that_is_no_command_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write(tmp_path / "r.yaml", out=str(tmp_path / "set"), steps=["stats {out}", "annotat size {out}"])
    assert main(["run", str(path)]) == 2
    assert re.search(r"error: step annotat size .*: emma-data: error: .*invalid choice", capsys.readouterr().err)
    assert main(["run", str(write(tmp_path / "r.yaml")), "nothing=1"]) == 2


def test_a_run_goes_on_at_the_step_that_failed_and_a_changed_step_is_run_again(tmp_path: Path) -> None:
    steps, done = [("stats", "a"), ("stats", "b"), ("stats", "c")], []
    broken = {"b"}

    def run_step(step: Any) -> int:
        done.append(step[1])
        return 1 if step[1] in broken else 0

    recipe = DataRecipe(tmp_path / "set", tuple(steps))
    assert run_steps(recipe, run_step) == 1 and done == ["a", "b"]
    broken.clear()
    assert run_steps(recipe, run_step) == 0 and done == ["a", "b", "b", "c"]
    assert run_steps(recipe, run_step) == 0 and done == ["a", "b", "b", "c"]
    assert run_steps(DataRecipe(tmp_path / "set", (steps[0], ("stats", "x"), steps[2])), run_step) == 0
    assert done == ["a", "b", "b", "c", "x", "c"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_step_of_the_repositorys_recipes_is_a_command_with_known_operators(path: Path) -> None:
    variables = {name: name for name in yaml.safe_load(path.read_text())["variables"]} | {"workers": "2"}
    numbers = {name: "10" for name in ("quota", "top") if name in variables}
    recipe = load_data_recipe(path, {n: v for n, v in {**variables, **numbers}.items() if n != "workers"})
    for step in recipe.steps:
        arguments = parse_step(step, build_parser)
        if step[0] == "annotate" and step[1] in OPERATORS:
            keys = dict(word.split("=", 1) for word in arguments.settings)
            assert set(keys) <= set(load_operator(step[1]).settings), step


def test_there_is_a_recipe_for_each_folder_that_emma_4b_names() -> None:
    named = {
        folder
        for path in (ROOT / "recipes" / "emma-4b").glob("*.yaml")
        for folder in re.findall(r"path: (data/[\w/-]+)", path.read_text())
    }
    written = {yaml.safe_load(path.read_text())["out"] for path in RECIPES}
    assert named == written and len(RECIPES) == len(written)
    for path in RECIPES:
        assert path.stem == yaml.safe_load(path.read_text())["out"].removeprefix("data/").replace("/", "-")
