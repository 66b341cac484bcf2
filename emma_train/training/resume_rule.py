"""The resume rule: a resumed run keeps the settings that decide what is learned from which data (contract 4).

The metadata of a config field says whether it is one of them: `resume` is fixed or free (config/schema.py).
"""

import logging
from collections.abc import Mapping
from typing import Any

from emma_train.config.load import as_dict
from emma_train.config.renamed import current_key
from emma_train.config.schema import Recipe
from emma_train.config.setting import Rule, settings_of
from emma_train.config.stored import complete, keep_stored
from emma_train.errors import UserError

log = logging.getLogger(__name__)


def recipe_to_resume(recipe: Recipe, stored: Mapping[str, Any], source: str) -> Recipe:
    """The recipe with which to resume a checkpoint whose config is `stored`; `source` names the checkpoint.

    A fixed field that the recipe does not set takes the checkpoint's value. A log line names it.
    Raises UserError if the recipe contradicts the checkpoint.
    """
    kept, lines = keep_stored(
        recipe, stored, source, lambda key, field: field.rule == "fixed" and not is_allowed(recipe, key)
    )
    for line in lines:
        log.info("%s: %s", source, line)
    check_resume(kept, stored, source)
    return kept


def check_resume(recipe: Recipe, stored: Mapping[str, Any], source: str) -> None:
    """Raise UserError if the recipe contradicts the config of a checkpoint."""
    if differences := contradictions(recipe, stored):
        key, more = differences[0].split(" ")[0], len(differences) - 1
        raise UserError(
            f"{source}: {differences[0]}"
            + f" (and {more} more)" * (more > 0)
            + "; put it back, start another run.name, "
            f"or accept with resume.allow=[{key}]"
        )


def contradictions(recipe: Recipe, stored: Mapping[str, Any]) -> list[str]:
    """Fixed fields that differ from a checkpoint's config and that resume.allow does not name, with both values."""
    ours, theirs = _fixed_values(as_dict(recipe), Recipe), _fixed_values(complete(stored, "checkpoint"), Recipe)
    return [
        f"{key} is {ours.get(key)!r} in the recipe and {theirs.get(key)!r} in the checkpoint"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not is_allowed(recipe, key)
    ]


def is_allowed(recipe: Recipe, key: str) -> bool:
    """Whether resume.allow names the key, or a section or list that it belongs to; old names count too."""
    allowed = [current_key(name) for name in recipe.resume.allow]
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in allowed)


def _fixed_values(values: Mapping[str, Any], schema: type, prefix: str = "", rule: Rule = "fixed") -> dict[str, Any]:
    """Dotted key -> value of the fixed fields. A key that is not in the schema follows the rule of its section."""
    fields = {field.key: field for field in settings_of(schema, rule)}
    fixed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is not None and field.section is not None:
            fixed |= _fixed_values(value, field.section, f"{prefix}{key}.", field.rule)
        elif (field.rule if field is not None else rule) == "fixed":
            fixed[f"{prefix}{key}"] = value
    return fixed
