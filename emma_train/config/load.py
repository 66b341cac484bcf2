"""Load a recipe: file, `extends:` and `key=value` overrides become a checked dataclass.

A mistake raises UserError: one line that says what is wrong and what to do.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import re
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emma_train.config.check import check_recipe
from emma_train.config.renamed import RENAMED, current_key, old_keys, with_current_names
from emma_train.config.schema import Pipeline, Recipe
from emma_train.config.secrets import without_secrets
from emma_train.config.setting import Setting, all_settings, settings_of
from emma_train.config.values import check_values
from emma_train.errors import UserError

log = logging.getLogger(__name__)
MOST_DOTS = 16
"""In a key; deeper ones would end in Python's limit of recursion."""
LONGEST_SHOWN = 200
"""Characters of a value in an error."""
Schema = TypeVar("Schema", Recipe, Pipeline)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe and what it extends, with the current names of keys; the file's own values win.

    Raises UserError.
    """
    return _read(Path(path))[0]


def _read(path: Path, children: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """The values of a file and of what it extends, and the old names of keys that they use."""
    if path.resolve() in children:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in children)}")
    values = _read_values(path)
    base, used = values.pop("extends", None), old_keys(values)
    values = with_current_names(values, str(path))
    if base is None:
        return values, used
    base_path = path.parent / str(base)
    inherited, used_by_base = _read(base_path, (*children, path.resolve()))
    return _merged(inherited, values, path, base_path), [*used_by_base, *used]


def _read_values(path: Path) -> dict[str, Any]:
    """The values of one file. Raises UserError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); recipes/ holds the shipped ones") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, found {type(values).__name__}")
    _check_literal(values, str(path))
    return values


def _check_literal(values: Any, source: str) -> None:
    """Raise UserError on a value with `${...}`: OmegaConf would replace it, by a variable of the environment too, and
    recipes are kept in checkpoints and exports and sent to trackers."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            _check_literal(value, source)
    elif isinstance(values, str) and "${" in values:
        raise UserError(f"{source}: {values!r} is not replaced in a recipe; write the value itself")


def load_stored_yaml(path: Path) -> dict[str, Any]:
    """Read the recipe that a run folder or an export keeps. It is complete, so it must extend nothing: `extends` would
    read a file of any folder. Raises UserError."""
    values = _read_values(path)
    if "extends" in values:
        raise UserError(f"{path}: has extends, but a stored recipe is complete; do not trust it")
    return with_current_names(values, str(path))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, whatever is wrong with it."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value, default=str)  # raises where an alias makes a value part of itself
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(message) from None
    return value


def _merged(base: dict[str, Any], values: dict[str, Any], path: Path, base_path: Path, prefix: str = "") -> Any:
    """The values of the file `base_path` and, over them, those of `path`. Sections are joined, lists replaced.

    Raises UserError where only one of two values is a section.
    """
    merged = dict(base)
    for key, value in values.items():
        inherited = base.get(key)
        if isinstance(inherited, dict) and isinstance(value, dict):
            value = _merged(inherited, value, path, base_path, f"{prefix}{key}.")
        elif None not in (inherited, value) and isinstance(inherited, dict) != isinstance(value, dict):
            raise UserError(f"{path}: {prefix}{key} is {_short(value)}, but {_short(inherited)} in {base_path}")
        merged[key] = value
    return merged


def is_pipeline(path: Path) -> bool:
    """Whether the file lists several stages, and is not the recipe of one. Raises UserError."""
    return "pipeline" in load_yaml(path)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """One stage's recipe with its overrides, complete and checked. Raises UserError."""
    recipe = _build(Recipe, path, overrides or [])
    check_recipe(recipe, str(path))
    return recipe


def load_pipeline(path: Path, overrides: list[str] | None = None) -> tuple[Pipeline, list[str]]:
    """A pipeline, and the overrides for each of its stages: those of all keys but run.*. Raises UserError."""
    for_pipeline = [o for o in overrides or [] if o.startswith("run.")]
    stages = [o for o in overrides or [] if not o.startswith("run.")]
    pipeline = _build(Pipeline, path, for_pipeline)
    check_values(pipeline, str(path))
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
        recipe.tracker.group = recipe.tracker.group or pipeline.run.name
        if recipe.train.checkpoints:
            recipe.train.checkpoints = f"{recipe.train.checkpoints.rstrip('/')}/{pipeline.run.name}"
            previous = f"{recipe.train.checkpoints}/{file.stem}"
        stages.append((file, recipe))
    return stages


def recipe_files(path: Path) -> list[Path]:
    """All files that a recipe reads: itself, what it extends, and the stages of a pipeline. Raises UserError."""
    values = _read_values(path)
    others = [str(name) for name in [values.get("extends"), *(values.get("pipeline") or [])] if name is not None]
    return list(dict.fromkeys([path, *(file for name in others for file in recipe_files(path.parent / name))]))


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe as YAML, which can be loaded again; URLs are without passwords and access tokens."""
    return yaml.safe_dump(to_stored(recipe), sort_keys=False, allow_unicode=True)


def to_stored(recipe: Recipe) -> dict[str, Any]:
    """Plain values as files and trackers keep them: URLs are without passwords and access tokens."""
    return without_secrets(as_dict(recipe))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, with the names that recipes use."""
    return cast(dict[str, Any], plain(recipe))


def plain(value: Any) -> Any:
    """A config value as lists, dicts and scalars, with the names that recipes use."""
    if dataclasses.is_dataclass(value):
        return {field.key: plain(getattr(value, field.name)) for field in settings_of(type(value))}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return dict(value) if isinstance(value, dict) else value


def from_dict(values: dict[str, Any], source: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from plain values, unchecked; `source` names them in errors. Raises UserError."""
    return _from_values(Recipe, values, source, overrides or [])


def config_hash(recipe: Recipe) -> str:
    """Hash of all values of the recipe: 12 hex digits. A new access token does not change it."""
    return hashlib.sha256(json.dumps(to_stored(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _build(schema: type[Schema], path: Path, overrides: list[str]) -> Schema:
    values, used = _read(Path(path))
    used += [key for override in overrides if (key := override.partition("=")[0]) in RENAMED]
    if used:
        renamed = ", ".join(f"{key} is now {current_key(key)}" for key in dict.fromkeys(used))
        log.warning("%s: keys were renamed, the old names still work: %s", path, renamed)
    return _from_values(schema, values, str(path), overrides)


def _from_values(schema: type[Schema], values: dict[str, Any], source: str, overrides: list[str]) -> Schema:
    merged = OmegaConf.structured(schema)
    set_keys: set[str] = set()
    for override in [None, *overrides]:
        layer, layer_source = (values, source) if override is None else _parse_override(override, merged)
        _check_literal(layer, layer_source)
        layer = with_current_names(layer, layer_source)
        _check_keys(layer, schema, layer_source)
        set_keys |= _set_keys(layer, schema)
        try:
            merged.merge_with(_with_field_names(layer, schema))
        except OmegaConfBaseException as error:
            raise UserError(f"{layer_source}: {_plain(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{source}: no value for {', '.join(missing)}; set it in the recipe or as {missing[0]}=VALUE")
    try:
        built = cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_plain(error)}") from None
    if isinstance(built, Recipe):
        built.set_keys = frozenset(set_keys)
    return built


def _parse_override(override: str, merged: DictConfig) -> tuple[dict[str, Any], str]:
    """The nested values of `key=value`, and how errors name it. An entry of a list is named by its number, as in
    data.sources[0].path; `merged` has the list."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r}: expected key=value, such as train.steps=100")
    if key.count(".") > MOST_DOTS:
        raise UserError(f"override {_short(override)}: unknown key; no key has so many parts")
    try:
        value: Any = parse_yaml(text) if text else ""
    except ValueError:
        raise UserError(f"override {_short(override)}: {_short(text)} is not a YAML value") from None
    source = f"override {_short(override)}"
    if entry := re.fullmatch(r"([\w.]+)\[(\d{1,9})\]\.(\w+)", key):
        key, value = entry[1], _with_entry(merged, entry[1], int(entry[2]), {entry[3]: value}, source)
    return _nested(key, value), source


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {a: {b: value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _with_entry(merged: DictConfig, key: str, index: int, values: dict[str, Any], source: str) -> list[Any]:
    """The list at `key` with other values in one entry. Raises UserError where there is no such entry."""
    node = OmegaConf.select(merged, key)
    if not isinstance(node, ListConfig):
        return [values]  # which the check of keys and values refuses
    entries = plain(OmegaConf.to_object(node))
    if index >= len(entries) or not isinstance(entries[index], dict):
        raise UserError(f"{source}: {key} has {len(entries)} entries, counted from 0, and no such one with keys")
    entries[index] |= values
    return cast(list[Any], entries)


def _plain(error: OmegaConfBaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    message = lines[0] if len(lines[0]) <= LONGEST_SHOWN else f"{lines[0][:LONGEST_SHOWN]}..."
    return f"{key}: {message}" if key else message


def _short(value: Any) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _with_field_names(values: Any, schema: type) -> Any:
    """The same values under the names of the dataclass fields: a recipe's `from` is a keyword in Python."""
    if not isinstance(values, dict):
        return values
    fields = {field.key: field for field in settings_of(schema)}
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        inner = fields[key].section if key in fields else None
        if key in fields and fields[key].facts.single and isinstance(value, str):
            value = [value]
        if key in fields and value is False and "off" in fields[key].facts.choices:
            value = "off"  # which YAML reads as false
        renamed[fields[key].name if key in fields else key] = _with_field_names(value, inner) if inner else value
    return renamed


def _set_keys(values: Any, schema: type, prefix: str = "") -> set[str]:
    """Dotted keys of the fields that `values` sets; entries of a list as in data.sources[0].path."""
    keys: set[str] = set()
    for field in settings_of(schema) if isinstance(values, dict) else []:
        if field.key not in values:
            continue
        key, value = f"{prefix}{field.key}", values[field.key]
        if field.section is None:
            keys.add(key)
            if field.element is not None and isinstance(value, list):
                for index, entry in enumerate(value):
                    keys |= _set_keys(entry, field.element, f"{key}[{index}].")
        elif field.facts.set_together:
            keys |= {inner for inner, _ in all_settings(field.section, f"{key}.")}
        else:
            keys |= _set_keys(value, field.section, f"{key}.")
    return keys


def _check_keys(values: Any, schema: type, source: str, prefix: str = "", root: type | None = None) -> None:
    """Raise UserError on the first key that the schema does not have, naming the nearest known one."""
    if not isinstance(values, dict):
        return
    root, fields = root or schema, {field.key: field for field in settings_of(schema)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in fields:
            raise UserError(f"{source}: unknown key {full}; {_advice(str(key), prefix, list(fields), root)}")
        field = fields[key]
        if value is not None and (needed := _needed_shape(field, value)):
            raise UserError(f"{source}: {full} is {needed}, found {_short(value)}")
        if field.section is not None:
            _check_keys(value, field.section, source, f"{full}.", root)
        elif field.element is not None:
            for index, entry in enumerate(value or []):
                if not isinstance(entry, dict):
                    raise UserError(f"{source}: {full}[{index}] is a section, found {_short(entry)}")
                _check_keys(entry, field.element, source, f"{full}[{index}].", root)


def _needed_shape(field: Setting, value: Any) -> str:
    """What a field holds, if the value is not of that shape: a section, list, mapping or single value."""
    if field.section is not None:
        return "" if isinstance(value, dict) else "a section"
    if field.element is not None:
        return "" if isinstance(value, list) else "a list of sections, as in [{...}, {...}]"
    origin, is_single = typing.get_origin(field.kind), not isinstance(value, list | dict)
    if origin is list and is_single and field.facts.single:
        return ""
    if origin in (list, dict):
        entries = [] if is_single else value if isinstance(value, list) else value.values()
        if not isinstance(value, origin) or any(isinstance(entry, list | dict) for entry in entries):
            return "a list of single values" if origin is list else "a mapping of single values"
        return ""
    if field.kind is bool and isinstance(value, int | float) and value not in (0, 1):
        return "true or false"
    return "" if is_single else "a single value"


def _advice(key: str, prefix: str, siblings: list[str], root: type) -> str:
    """The known key that an unknown one probably means."""
    known = _known_keys(root)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key]
    near_siblings = [prefix + name for name in difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)]
    near = same_leaf or near_siblings or difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"


def _known_keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in settings_of(schema):
        keys.append(f"{prefix}{field.key}")
        if field.section is not None:
            keys += _known_keys(field.section, f"{prefix}{field.key}.")
    return keys
