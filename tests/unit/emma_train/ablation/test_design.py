"""Files of ablations: what they say, and mistakes in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from emma_train.ablation.design import load_ablation, trials_of
from emma_train.ablation.results import TrialResult, append_result, read_results, without_result
from emma_train.errors import UserError
from tests.helpers import ROOT, recipe_values, write_recipe

ARMS = {"emma": {}, "other": {"set": {"model.und_attention": "full"}}}
ABLATIONS = sorted(path for path in (ROOT / "recipes" / "ablations").glob("*.yaml") if "arms:" in path.read_text())


def write(tmp_path: Path, **values: Any) -> Path:
    write_recipe(tmp_path / "recipe.yaml", recipe_values())
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "arms": ARMS, **values}, sort_keys=False))
    return path


def test_trials_are_paired_by_seed(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path, seeds=[3, 5], set={"train.steps": 7}), ["train.log_every=2"])
    trials = trials_of(ablation, "runs")
    assert [trial.name for trial in trials] == ["emma, seed 3", "other, seed 3", "emma, seed 5", "other, seed 5"]
    assert len({trial.folder for trial in trials}) == len({trial.recipe_hash for trial in trials}) == 4
    for trial in trials:
        [recipe] = trial.stages
        assert recipe.model.seed == recipe.data.seed == trial.seed
        assert (recipe.train.steps, recipe.train.log_every) == (7, 2)
        assert trial.run_folder == trial.folder
        assert recipe.model.und_attention == ("causal" if trial.arm.name == "emma" else "full")


def test_arms_that_train_the_same_share_a_run(tmp_path: Path) -> None:
    arms = {"weak": {"evaluate": {"text-guidance": 1}}, "strong": {"evaluate": {"text-guidance": 4, "no-ema": True}}}
    ablation = load_ablation(write(tmp_path, arms=arms, evaluate={"limit": 8, "size": [64, 32]}))
    weak, strong = trials_of(ablation, "runs")
    assert weak.folder == strong.folder and weak.recipe_hash != strong.recipe_hash
    assert strong.arm.options == ("--limit", "8", "--size", "64", "32", "--text-guidance", "4", "--no-ema")
    elsewhere = trials_of(ablation, "elsewhere")
    assert [trial.recipe_hash for trial in elsewhere] == [weak.recipe_hash, strong.recipe_hash]
    assert load_ablation(write(tmp_path)).arms[0].options is None


def test_an_arm_may_name_its_recipe(tmp_path: Path) -> None:
    """Pipelines of different lengths have equal seeds in all their stages, and runs of their names."""
    pipelines = {"short": ["stage1.yaml", "stage2.yaml"], "long": ["stage1.yaml", "stage2.yaml", "stage3.yaml"]}
    for name, stages in pipelines.items():
        write_recipe(tmp_path / f"{name}.yaml", {"pipeline": stages, "run": {"name": name}})
    for stage in pipelines["long"]:
        write_recipe(tmp_path / stage, recipe_values(stage.removesuffix(".yaml")))
    arms = {"none": {"recipe": "short.yaml"}, "tuned": {"recipe": "long.yaml"}, "one": {}}
    *trials, last = trials_of(load_ablation(write(tmp_path, arms=arms, seeds=[7])), "runs")
    assert [[stage.stage.name for stage in trial.stages] for trial in trials] == [
        ["stage1", "stage2"],
        ["stage1", "stage2", "stage3"],
    ]
    assert {(stage.model.seed, stage.data.seed) for trial in trials for stage in trial.stages} == {(7, 7)}
    assert [trial.folder.name.rsplit("-", 2)[0] for trial in (*trials, last)] == ["short", "long", "recipe"]
    assert trials[1].run_folder == trials[1].folder / "stage3" and last.run_folder == last.folder
    path = write(tmp_path, arms=arms, recipe="")
    with pytest.raises(UserError, match="arm one: recipe is not given"):
        load_ablation(path)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"arms": {"emma": {}}}, ("arms names what is compared, two at least",)),
        ({"arms": {"a b": {}, "c": {}}}, ("arm 'a b'", "letters")),
        ({"arms": {"a": {}, "b": {"sett": {}}}}, ("arm b: unknown key 'sett'", "did you mean set?")),
        ({"arms": {"a": {}, "b": {"set": ["x"]}}}, ("arm b: set is ['x']", "dotted keys")),
        ({"seed": [1]}, ("unknown key 'seed'", "did you mean seeds?")),
        ({"seeds": [0, 0]}, ("seeds lists one twice",)),
        ({"seeds": "three"}, ("seeds is 'three'",)),
        ({"metrics": []}, ("metrics is []",)),
        ({"recipe": ""}, ("recipe is not given",)),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, values: dict[str, Any], messages: tuple[str, ...]) -> None:
    path = write(tmp_path, **values)
    with pytest.raises(UserError) as error:
        load_ablation(path)
    assert all(message in str(error.value) for message in (str(path), *messages))


def test_an_arm_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, arms={"a": {}, "b": {"set": {"model.und_atention": "full"}}})
    with pytest.raises(UserError, match=r"arm b: .*und_atention"):
        trials_of(load_ablation(path), "runs")


def test_a_finished_trial_is_skipped_and_one_of_another_recipe_refused(tmp_path: Path) -> None:
    trials = trials_of(load_ablation(write(tmp_path)), "runs")
    out = tmp_path / "results.jsonl"
    assert read_results(out) == [] and without_result(trials, [], out) == trials
    done = TrialResult("emma", 0, "abc", trials[0].recipe_hash, 1, 2, 3.0, 4.0, "cpu", {"val/loss": 0.5})
    out.write_text('{"arm": "other", "se')  # cut off
    append_result(out, done)
    assert read_results(out) == [done] and without_result(trials, [done], out) == trials[1:]
    longer = trials_of(load_ablation(write(tmp_path), ["train.steps=9"]), "runs")
    with pytest.raises(UserError, match="the line of emma, seed 0 is of another recipe"):
        without_result(longer, [done], out)
    for text in ("no result\n" + out.read_text(), "no result\n", "no result", "{}\n"):
        out.write_text(text)
        with pytest.raises(UserError, match=r"results.jsonl:1: no result of an ablation"):
            read_results(out)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_the_shipped_ablations_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ablation = load_ablation(path)
    trials = trials_of(replace(ablation, seeds=(0,)), "runs")
    assert len({trial.recipe_hash for trial in trials}) == len(ablation.arms) and ablation.question
    assert ablation.out == f"docs/ablations/{path.stem}.jsonl"
