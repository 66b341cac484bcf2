"""Recipe file + `extends:` + `key=value` overrides -> a checked dataclass. Every mistake is one line that says what
to do."""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emma_train.config.check import check_recipe
from emma_train.config.renamed import with_current_names
from emma_train.config.schema import Pipeline, Recipe
from emma_train.errors import UserError

Schema = TypeVar("Schema", Recipe, Pipeline)


def load_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and what it extends; the file's own values win. Raises UserError."""
    path = Path(path)
    if path.resolve() in _seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in _seen)}")
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); recipes/ holds the shipped ones") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    parent = load_yaml(path.parent / str(base), (*_seen, path.resolve()))
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(parent, values)))


def is_pipeline(path: Path) -> bool:
    """Whether the file lists stages rather than being one. Raises UserError."""
    return "pipeline" in load_yaml(path)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """One stage's recipe with its overrides, complete and checked. Raises UserError."""
    recipe = _build(Recipe, path, overrides or [])
    check_recipe(recipe, str(path))
    return recipe


def load_pipeline(path: Path, overrides: list[str] | None = None) -> tuple[Pipeline, list[str]]:
    """A pipeline, and the overrides that are meant for each of its stages. Raises UserError."""
    own = [o for o in overrides or [] if o.startswith("run.")]
    stages = [o for o in overrides or [] if not o.startswith("run.")]
    pipeline = _build(Pipeline, path, own)
    if not pipeline.pipeline:
        raise UserError(f"{path}: pipeline lists no stage")
    return pipeline, stages


def load_stages(path: Path, overrides: list[str] | None = None) -> list[tuple[Path, Recipe]]:
    """The recipes to train in order, each with its file: the stages of a pipeline, or the one recipe of another file.

    A pipeline's stages have their run folders inside that of the pipeline, and each starts from the one before.
    Raises UserError.
    """
    if not is_pipeline(path):
        return [(path, load_recipe(path, overrides))]
    pipeline, stage_overrides = load_pipeline(path, overrides)
    root = Path(pipeline.run.root) / pipeline.run.name
    stages: list[tuple[Path, Recipe]] = []
    previous = ""
    for name in pipeline.pipeline:
        file = path.parent / name
        values = {"run.root": str(root), "run.name": file.stem} | ({"init.from": previous} if previous else {})
        from_pipeline = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        recipe = load_recipe(file, [*stage_overrides, *from_pipeline])
        previous = str(root / file.stem)
        if recipe.train.checkpoints:
            recipe.train.checkpoints = f"{recipe.train.checkpoints.rstrip('/')}/{pipeline.run.name}"
            previous = f"{recipe.train.checkpoints}/{file.stem}"
        stages.append((file, recipe))
    return stages


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as it may be written in a file and loaded again."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, with the names that recipes use."""
    values = dataclasses.asdict(recipe)
    values["init"] = {"from": values["init"]["source"], **{k: v for k, v in values["init"].items() if k != "source"}}
    return values


def from_dict(values: dict[str, Any], where: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from the plain values that a checkpoint keeps; `where` names it in errors. Raises UserError."""
    return _from_values(Recipe, values, where, overrides or [])


def config_hash(recipe: Recipe) -> str:
    """Twelve hex digits that change with any value of the recipe."""
    return hashlib.sha256(json.dumps(as_dict(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _build(schema: type[Schema], path: Path, overrides: list[str]) -> Schema:
    return _from_values(schema, load_yaml(path), str(path), overrides)


def _from_values(schema: type[Schema], values: dict[str, Any], path: str, overrides: list[str]) -> Schema:
    known = _known_keys(schema)
    values = with_current_names(values)
    _check_keys(values, schema, path, known)
    merged = OmegaConf.merge(OmegaConf.structured(schema), {})
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)
    try:
        merged.merge_with(_rename_from(values))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_plain(error)}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r}: expected key=value, such as train.steps=100")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        nested = with_current_names(nested)
        _check_keys(nested, schema, f"override {override!r}", known)
        try:
            merged.merge_with(_rename_from(nested))
        except OmegaConfBaseException as error:
            raise UserError(f"override {override!r}: {_plain(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{path}: no value for {', '.join(missing)}; set it in the recipe or as {missing[0]}=VALUE")
    try:
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_plain(error)}") from None


def _plain(error: OmegaConfBaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"{key}: {lines[0]}" if key else lines[0]


def _rename_from(values: dict[str, Any]) -> dict[str, Any]:
    # `from` is a keyword in Python, so the dataclass field cannot have the name that recipes use.
    init = values.get("init")
    if not isinstance(init, dict) or "from" not in init:
        return values
    return {**values, "init": {("source" if k == "from" else k): v for k, v in init.items()}}


def _known_keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for f in dataclasses.fields(schema):
        name = "from" if prefix == "init." and f.name == "source" else f.name
        keys.append(prefix + name)
        if dataclasses.is_dataclass(f.type):
            keys += _known_keys(cast(type, f.type), f"{prefix}{name}.")
    return keys


def _check_keys(values: Any, schema: type, where: str, known: list[str], prefix: str = "") -> None:
    """Raise on the first key that the schema does not have, naming its nearest known one."""
    if not isinstance(values, dict):
        return
    fields = {("from" if prefix == "init." and f.name == "source" else f.name): f for f in dataclasses.fields(schema)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in fields:
            same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == str(key)]
            siblings = [prefix + name for name in difflib.get_close_matches(str(key), list(fields), n=1, cutoff=0.5)]
            near = same_leaf or siblings or difflib.get_close_matches(full, known, n=1, cutoff=0.5)
            advice = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {full}; {advice}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{where}: {full} is a section, found {value!r}")
            _check_keys(value, cast(type, kind), where, known, f"{full}.")
