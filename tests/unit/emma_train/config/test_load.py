"""Recipes from files: extends, overrides, and one clear line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from emma_train.config import UserError, config_hash, load_recipe, to_yaml
from emma_train.config.load import as_dict, from_dict, is_pipeline, load_pipeline, load_stages, load_yaml
from emma_train.config.renamed import RENAMED, current_key
from emma_train.config.schema import Recipe
from emma_train.config.setting import all_settings
from tests.helpers import ROOT, recipe_values, tiny_recipe, write_recipe

TINY = ROOT / "recipes" / "tiny"


def recipe_file(folder: Path, name: str = "recipe.yaml", **dotted: Any) -> Path:
    return write_recipe(folder / name, recipe_values(**dotted))


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values_by_key = {}
    for key, value in values.items():
        values_by_key |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values_by_key


def test_own_values_win_over_those_that_are_extended_through_two_files(tmp_path: Path) -> None:
    recipe_file(tmp_path, "far.yaml", train__steps=7, data__slots=2, optimizer__lr=0.5)
    write_recipe(tmp_path / "near.yaml", {"extends": "far.yaml", "train": {"steps": 8}, "optimizer": {"lr": 0.25}})
    path = write_recipe(tmp_path / "own.yaml", {"extends": "near.yaml", "train": {"steps": 9}})
    recipe = load_recipe(path)
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.data.slots) == (9, 0.25, 2)


def test_a_list_is_replaced_not_joined(tmp_path: Path) -> None:
    recipe_file(tmp_path, "far.yaml", data__sources=[{"path": "a"}, {"path": "b"}])
    path = write_recipe(tmp_path / "own.yaml", {"extends": "far.yaml", "data": {"sources": [{"path": "c"}]}})
    assert [s.path for s in load_recipe(path).data.sources] == ["c"]


def test_an_entry_of_a_list_is_named_by_its_number() -> None:
    """The rest of the entry, and the other entries, stay as they are."""
    recipe = load_recipe(TINY / "stage4_expert.yaml", ["data.sources[0].path=elsewhere"])
    (source,) = recipe.data.sources
    assert (source.path, source.require_tags) == ("elsewhere", ["stem"])
    phases = load_recipe(TINY / "stage2.yaml", ["data.phases[1].steps=7", "train.steps=247"]).data.phases
    assert [(phase.name, phase.steps) for phase in phases] == [("a", 40), ("b", 7), ("c", 200)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources[1].path=x", "data.sources has 1 entries, counted from 0, and no such one"),
        ("data.sources[0].pth=x", "did you mean data.sources[0].path?"),
        ("data.slots[0].path=x", "data.slots is a single value"),
    ],
)
def test_an_entry_that_a_list_does_not_have_is_named(override: str, words: str) -> None:
    assert words in error_of(TINY / "stage4_expert.yaml", override)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_circular_extends_is_an_error_that_names_the_circle(tmp_path: Path, names: list[str]) -> None:
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        write_recipe(tmp_path / f"{name}.yaml", {"extends": f"{following}.yaml"})
    message = error_of(tmp_path / "a.yaml")
    assert "extends itself through" in message and all(f"{name}.yaml" in message for name in names)


def test_overrides_win_and_take_yaml_values(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    recipe = load_recipe(
        path,
        [
            "train.steps=50",
            "optimizer.lr=3e-5",
            "init.from=null",
            "model.decoder.shared=[mlp, norm]",
            "train.sample_from=''",
        ],
    )
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.init.source) == (50, 3e-5, None)
    assert recipe.model.decoder.shared == ["mlp", "norm"] and recipe.train.sample_from == ""
    assert load_recipe(path, ["train.steps=50", "train.steps=51"]).train.steps == 51


def test_off_is_a_choice_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, engine__precision="bf16")
    assert load_recipe(path, ["engine.fp8=rowwise"]).engine.fp8 == "rowwise"
    assert load_recipe(path, ["engine.fp8=rowwise", "engine.fp8=off"]).engine.fp8 == "off"
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(load_recipe(path)))
    assert load_recipe(written).engine.fp8 == "off"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.stepz=3", "train.steps"),
        ("trian.steps=3", "train"),
        ("optimizer.learning_rate=1", "optimizer."),
        ("data.und.sides=64", "data.und.side"),
        ("init.form=x", "init.from"),
        ("model.decoder.hiden=32", "model.decoder.hidden"),
        ("steps=3", "train.steps"),
        ("lr=3", "optimizer.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, override: str, nearest: str) -> None:
    path = recipe_file(tmp_path)
    message = error_of(path, override)
    assert f"unknown key {override.partition('=')[0].partition('.')[0]}" in message
    if not nearest.endswith("."):
        assert message.endswith(f"did you mean {nearest}?")
    key, _, value = override.partition("=")
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    in_file = write_recipe(tmp_path / "wrong.yaml", {"extends": "recipe.yaml", **nested})
    assert "wrong.yaml: unknown key" in error_of(in_file)


def test_an_unknown_key_inside_a_list_is_an_error_too(tmp_path: Path) -> None:
    assert "pth" in error_of(recipe_file(tmp_path, data__sources=[{"pth": "a"}]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ("train.steps", "many")),
        ("optimizer.lr=fast", ("optimizer.lr", "fast")),
        ("train=5", ("train is a section",)),
        ("data.sources=5", ("data.sources is a list of sections, as in [{...}, {...}], found 5",)),
        ("data.sources={path: x}", ("data.sources is a list of sections",)),
        ("data.sources.path=x", ("data.sources is a list of sections",)),
        ("data.sources=[x]", ("data.sources[0] is a section, found 'x'",)),
        ("data.sources=[{path: x, tasks: i2t}]", ("data.sources[0].tasks is a list of single values, found 'i2t'",)),
        ("optimizer.betas=0.9", ("optimizer.betas is a list of single values, found 0.9",)),
        ("optimizer.lr_scale=[1]", ("optimizer.lr_scale is a mapping of single values, found [1]",)),
        ("optimizer.lr_scale.vision=[1]", ("optimizer.lr_scale is a mapping of single values",)),
        ("optimizer.betas=[[0.9], 0.9]", ("optimizer.betas is a list of single values",)),
        ("engine.compile=2", ("engine.compile is true or false, found 2",)),
        ("train.steps={a: 1}", ("train.steps is a single value",)),
        ("train.steps=2024-99-99", ("not a YAML value",)),
        ("train.steps=" + "9" * 5000, ("train.steps",)),
        ("train.steps=" + "[" * 5000, ("not a YAML value",)),
        ("train.steps=&a [*a]", ("not a YAML value",)),
        ("a." * 3000 + "b=1", ("unknown key",)),
        ("ema.decay=[1]", ("ema.decay",)),
        ("train.steps", ("expected key=value",)),
        ("train.steps=[1", ("not a YAML value",)),
    ],
)
def test_a_value_of_the_wrong_type_names_key_and_value(tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    message = error_of(recipe_file(tmp_path), override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("key", ["run.name", "stage.name", "train.steps", "optimizer.lr", "data.tokenizer"])
def test_a_missing_value_is_named_with_a_way_out(tmp_path: Path, key: str) -> None:
    values = recipe_values()
    section, leaf = key.split(".")
    del values[section][leaf]
    message = error_of(write_recipe(tmp_path / "recipe.yaml", values))
    assert f"no value for {key}" in message and f"{key}=VALUE" in message


def test_files_that_cannot_be_recipes(tmp_path: Path) -> None:
    assert "cannot read the recipe" in error_of(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "found list" in error_of(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("train: [1\n")
    assert "not valid YAML" in error_of(tmp_path / "broken.yaml")
    write_recipe(tmp_path / "orphan.yaml", {"extends": "absent.yaml"})
    assert "absent.yaml: cannot read" in error_of(tmp_path / "orphan.yaml")


def test_what_is_written_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        init={"from": "runs/before", "ema": False},
        data__phases=[
            {"name": "a", "steps": 2, "mix": {"i2t": 1, "t2i": 1}, "sources": [{"path": "x", "tasks": ["i2t"]}]}
        ],
        optimizer__lr=1e-05,
        model__decoder__rope_theta=5e6,
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(recipe))
    again = load_recipe(path)
    assert again == recipe and config_hash(again) == config_hash(recipe)
    assert {"from": "runs/before", "ema": False}.items() <= yaml.safe_load(path.read_text())["init"].items()
    assert "source" not in yaml.safe_load(path.read_text())["init"]
    assert from_dict(as_dict(recipe), "checkpoint") == recipe


@pytest.mark.seconds
def test_the_hash_changes_with_any_value() -> None:
    recipe = tiny_recipe(init={"from": "a"})
    before, values = config_hash(recipe), as_dict(recipe)
    assert len(before) == 12 and before == config_hash(tiny_recipe(init={"from": "a"}))
    seen, names = {before}, leaves(values)
    for name, value in names.items():
        if isinstance(value, bool):
            other: Any = not value
        elif isinstance(value, int | float):
            other = value + 1
        elif isinstance(value, str):
            other = value + "x"
        elif value is None:
            other = "x"
        else:
            other = [] if value else ["x"]
            if name == "profile.steps":
                other = [3, 4]
            if name == "data.phases":
                other = [{"name": "p", "steps": 1}]
            if name == "health.skip_steps":
                other = [{"first": 1, "last": 2}]
            if name in ("data.sources", "validate.sources", "validate.questions"):
                other = [{"path": "elsewhere"}]
        *sections, leaf = name.split(".")
        changed = as_dict(recipe)
        parent = changed
        for section in sections:
            parent = parent[section]
        parent[leaf] = other
        seen.add(config_hash(from_dict(changed, "test")))
    assert len(names) > 80 and len(seen) == len(names) + 1


def test_a_pipeline_is_told_from_a_stage_and_passes_overrides_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "pipeline.yaml", {"run": {"name": "all"}, "pipeline": ["a.yaml", "b.yaml"]})
    assert is_pipeline(path) and not is_pipeline(recipe_file(tmp_path))
    pipeline, stages = load_pipeline(path, ["run.name=mine", "train.steps=3"])
    assert (pipeline.run.name, pipeline.pipeline, stages) == ("mine", ["a.yaml", "b.yaml"], ["train.steps=3"])
    with pytest.raises(UserError, match="lists no stage"):
        load_pipeline(write_recipe(tmp_path / "empty.yaml", {"run": {"name": "all"}, "pipeline": []}))


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "recipes").glob("*/stage*.yaml")) if path.parent.name != "data"],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_shipped_stage_recipe_has_only_known_keys(path: Path) -> None:
    assert load_yaml(path)
    load_recipe(path, ["model.autoencoder.path=x", "data.tokenizer=x", "data.sources=[{path: x}]"])


def test_stages_of_a_pipeline_follow_each_other_inside_its_run_folder(tmp_path: Path) -> None:
    for name in ("01.yaml", "02.yaml"):  # as YAML values, these names would be numbers
        (tmp_path / name).write_text(f"extends: {ROOT}/recipes/tiny/stage1.yaml\n")
    (tmp_path / "both.yaml").write_text("run: {root: runs, name: both}\npipeline: [01.yaml, 02.yaml]\n")
    stages = load_stages(tmp_path / "both.yaml", [f"run.root={tmp_path}/a b", "train.steps=7"])
    assert [file.name for file, _ in stages] == ["01.yaml", "02.yaml"]
    assert [(recipe.run.root, recipe.run.name) for _, recipe in stages] == [
        (f"{tmp_path}/a b/both", "01"),
        (f"{tmp_path}/a b/both", "02"),
    ]
    assert stages[1][1].init.source == f"{tmp_path}/a b/both/01"
    assert [recipe.train.steps for _, recipe in stages] == [7, 7]


def test_an_old_name_still_works_and_one_line_names_the_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = recipe_values(optimizer__clip=0.5)
    values["model"]["decoder"]["layers"] = values["model"]["decoder"].pop("num_layers")
    path = write_recipe(tmp_path / "recipe.yaml", values)
    recipe = load_recipe(path, ["train.sample_num=7"])
    assert (recipe.optimizer.max_grad_norm, recipe.model.decoder.num_layers, recipe.train.num_samples) == (0.5, 4, 7)
    assert caplog.messages == [
        f"{path}: keys were renamed, the old names still work: model.decoder.layers is now model.decoder.num_layers, "
        "optimizer.clip is now optimizer.max_grad_norm, train.sample_num is now train.num_samples"
    ]
    assert {"optimizer.max_grad_norm", "train.num_samples"} <= recipe.set_keys
    caplog.clear()
    load_recipe(recipe_file(tmp_path))
    assert caplog.messages == []


def test_both_names_in_one_file_must_agree(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, optimizer__clip=0.5, optimizer__max_grad_norm=0.25)
    assert error_of(path) == (
        f"{path}: optimizer.clip is now called optimizer.max_grad_norm; both are set, to 0.5 and 0.25; "
        "keep optimizer.max_grad_norm"
    )
    assert load_recipe(recipe_file(tmp_path, optimizer__clip=0.5, optimizer__max_grad_norm=0.5))


@pytest.mark.parametrize(("base", "child"), [("clip", "max_grad_norm"), ("max_grad_norm", "clip")])
def test_a_name_in_a_file_wins_over_the_other_name_in_the_file_that_it_extends(
    tmp_path: Path, base: str, child: str
) -> None:
    recipe_file(tmp_path, "base.yaml", **{f"optimizer__{base}": 0.5})
    path = write_recipe(tmp_path / "child.yaml", {"extends": "base.yaml", "optimizer": {child: 0.25}})
    assert load_recipe(path).optimizer.max_grad_norm == 0.25
    assert load_recipe(path, [f"optimizer.{base}=0.75"]).optimizer.max_grad_norm == 0.75


def test_a_typing_error_near_an_old_name_is_advised_with_the_new_one(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    assert error_of(path, "model.decoder.shalow=1").startswith("override 'model.decoder.shalow=1': unknown key")
    assert error_of(path, "model.vision.num_layer=1").endswith("did you mean model.vision.num_layers?")


def test_every_renamed_key_has_a_current_one() -> None:
    known = {key for key, _ in all_settings(Recipe)}
    assert not known & set(RENAMED) and {current_key(old) for old in RENAMED} <= known


def test_a_recipe_knows_what_was_set(tmp_path: Path) -> None:
    write_recipe(tmp_path / "base.yaml", {"flow": {"shift": 1.0}})
    path = recipe_file(tmp_path, extends="base.yaml", mix={"i2t": 1})
    recipe = load_recipe(path, ["init.from=null", "optimizer.betas=[0.9, 0.95]"])
    assert {"flow.shift", "init.from", "optimizer.betas", "mix.t2i", "data.sources[0].path"} <= recipe.set_keys
    assert not {"flow.logit_std", "data.sources[0].weight", "init.ema"} & recipe.set_keys
    assert "set_keys" not in as_dict(recipe)
    other = load_recipe(path, ["init.from=null", "optimizer.betas=[0.9, 0.95]", "flow.logit_std=1.0"])
    assert other == recipe and config_hash(other) == config_hash(recipe)


def test_a_mapping_of_groups_is_merged_by_group(tmp_path: Path) -> None:
    recipe_file(tmp_path, "base.yaml", optimizer__lr_scale={"vision": 0.1, "decoder": 1})
    path = write_recipe(tmp_path / "child.yaml", {"extends": "base.yaml", "optimizer": {"lr_scale": {"decoder": 0.5}}})
    recipe = load_recipe(path, ["optimizer.lr_scale.router=2"])
    assert recipe.optimizer.lr_scale == {"vision": 0.1, "decoder": 0.5, "router": 2.0}
    assert from_dict(as_dict(recipe), "checkpoint") == recipe
    assert "optimizer.lr_scale" in error_of(path, "optimizer.lr_scale=0.5")
    assert "optimizer.lr_scale.vision" in error_of(path, "optimizer.lr_scale.vision=fast")


@pytest.mark.parametrize(
    ("base", "child", "words"),
    [
        ({"model": {"seed": 1}}, {"model": [1]}, "model is [1], but {'seed': 1} in"),
        ({"model": [1]}, {"model": {"seed": 1}}, "model is {'seed': 1}, but [1] in"),
        ({"data": {"und": {"side": 64}}}, {"data": {"und": [64]}}, "data.und is [64], but {'side': 64} in"),
        ({"data": {"und": {"side": 64}}}, {"data": {"und": 64}}, "data.und is 64, but {'side': 64} in"),
    ],
)
def test_a_section_that_is_none_in_the_file_that_is_extended_is_named(
    tmp_path: Path, base: dict[str, Any], child: dict[str, Any], words: str
) -> None:
    write_recipe(tmp_path / "base.yaml", base)
    path = write_recipe(tmp_path / "child.yaml", {"extends": "base.yaml", **child})
    assert error_of(path) == f"{path}: {words} {tmp_path / 'base.yaml'}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("train: {steps: 1} # é".encode("latin-1"), "not a text file in UTF-8"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: &a {b: *a}", "not valid YAML"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"a: " + b"1" * 5000, "not valid YAML"),
        (b"a: \x00", "not valid YAML"),
        (b"? [1, 2]\n: 3", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_recipe_is_told_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    message = error_of(path)
    assert message.startswith(f"{path}: ") and words in message and len(message) < 500


def test_the_names_of_a_pipeline_are_checked_too(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "pipeline.yaml", {"pipeline": ["a.yaml"], "run": {"name": "../up"}})
    with pytest.raises(UserError, match="run.name is '../up'; it must name a folder inside run.root"):
        load_pipeline(path)
