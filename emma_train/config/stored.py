"""Read the config of a checkpoint or export that an older version may have written.

A renamed key gets its current name. A key that is missing gets the value of the old behaviour (`absent` in
config/setting.py). So checkpoints stay usable when a field is added or a default changes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from emma_train.config.check import check_recipe
from emma_train.config.load import as_dict, from_dict, plain
from emma_train.config.renamed import with_current_names
from emma_train.config.schema import Recipe
from emma_train.config.setting import Rule, Setting, settings_of
from emma_train.errors import UserError


def complete(stored: Mapping[str, Any], source: str, schema: type = Recipe) -> dict[str, Any]:
    """The plain values of a stored config under current names, with a value for each key that it lacks.

    Keys that this version does not know are kept as they are.
    """
    return _with_old_values(with_current_names(dict(stored), source), schema, source)


def from_stored(stored: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of a checkpoint or export, unchecked; `source` names it in errors. Raises UserError."""
    return from_dict(complete(stored, source), source)


def without_old_values(values: Mapping[str, Any], schema: type = Recipe) -> dict[str, Any]:
    """The plain values of a config, less each one that a config without its key means.

    So two versions of the code have equal results for one recipe, although one of them knows more keys.
    """
    kept = {}
    for field in settings_of(schema):
        value = values[field.key]
        if field.section is not None:
            value = without_old_values(value, field.section)
        elif field.element is not None:
            value = [without_old_values(entry, field.element) for entry in value]
        if value != ({} if field.section is not None else plain(field.old_value)):
            kept[field.key] = value
    return kept


def keep_stored(
    recipe: Recipe, stored: Mapping[str, Any], source: str, applies: Callable[[str, Setting], bool]
) -> tuple[Recipe, list[str]]:
    """The recipe with the stored value of each field that it does not set and for which `applies(key, field)` is true.

    So a changed default does not change a run that began with the old one. Also returns a log line for each such field.
    Raises UserError if the stored values do not fit the values that the recipe sets.
    """
    values, lines = as_dict(recipe), []
    for key, field, section, stored_value in list(_differences(values, complete(stored, source), Recipe)):
        default = plain(field.default)
        if key not in recipe.set_keys and section[field.key] == default and applies(key, field):
            section[field.key] = stored_value
            lines.append(f"{key} stays {stored_value!r}; the recipe does not set it, and its default is {default!r}")
    if not lines:
        return recipe, []
    kept = from_dict(values, source)
    kept.set_keys = recipe.set_keys
    check_recipe(kept, source)
    return kept, lines


def _with_old_values(values: Any, schema: type, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {values!r} stands where a section should be; copy it again")
    filled = dict(values)
    for field in settings_of(schema):
        if field.section is not None:
            filled[field.key] = _with_old_values(values.get(field.key) or {}, field.section, source)
        elif field.element is not None and field.key in values:
            entries = values[field.key] if isinstance(values[field.key], list) else [values[field.key]]
            filled[field.key] = [_with_old_values(entry, field.element, source) for entry in entries]
        elif field.key not in values and not field.required:
            filled[field.key] = plain(field.old_value)
    return filled


def _differences(
    values: dict[str, Any], stored: Mapping[str, Any], schema: type, prefix: str = "", resume: Rule = "fixed"
) -> Iterator[tuple[str, Setting, dict[str, Any], Any]]:
    """(dotted key, field, section of `values` that holds it, stored value) of each field whose values differ."""
    for field in settings_of(schema, resume):
        if field.key not in stored:
            continue
        key, value, stored_value = f"{prefix}{field.key}", values[field.key], stored[field.key]
        if field.section is not None:
            yield from _differences(value, stored_value, field.section, f"{key}.", field.rule)
        elif field.element is not None and len(value) == len(stored_value) > 0:
            for index, (entry, stored_entry) in enumerate(zip(value, stored_value, strict=True)):
                yield from _differences(entry, stored_entry, field.element, f"{key}[{index}].", field.rule)
        elif value != stored_value:
            yield key, field, values, stored_value
