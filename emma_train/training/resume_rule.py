"""The resume rule: a resumed run keeps the settings that decide what is learned from which data (contract 4).

The metadata of a config field says whether it is one of them: `resume` is fixed or free (config/schema.py).
"""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from emma_train.config.load import to_stored
from emma_train.config.renamed import current_key, with_current_names
from emma_train.config.schema import Recipe
from emma_train.config.secrets import without_secrets
from emma_train.config.setting import Rule, all_settings, settings_of
from emma_train.config.stored import complete, keep_stored
from emma_train.errors import UserError
from emma_train.training.schedule import learning_rate

log = logging.getLogger(__name__)
STRICT = {key for key, field in all_settings(Recipe) if field.facts.strict}
"""Keys that resume.allow cannot accept."""


def recipe_to_resume(recipe: Recipe, stored: Mapping[str, Any], source: str, step: int = 0) -> Recipe:
    """The recipe with which to resume a checkpoint of `step` whose config is `stored`; `source` names the checkpoint.

    A fixed field that the recipe does not set takes the checkpoint's value. A log line names it, each accepted
    contradiction, and what another train.steps does to the learning rate.
    Raises UserError if the recipe contradicts the checkpoint.
    """
    check_allowed_keys(recipe, stored)
    kept, lines = keep_stored(
        recipe, stored, source, lambda key, field: field.rule == "fixed" and not is_allowed(recipe, key)
    )
    check_resume(kept, stored, source)
    accepted = [f"accepted: {line}" for line in _differences(kept, stored).values()]
    rate = [line for line in [_rate_change(kept, stored, step)] if line]
    for line in [*lines, *accepted, *rate]:
        log.info("%s: %s", source, line)
    return kept


def check_resume(recipe: Recipe, stored: Mapping[str, Any], source: str) -> None:
    """Raise UserError if the recipe contradicts the config of a checkpoint."""
    if differences := contradictions(recipe, stored):
        lines, keys = list(differences.values()), ",".join(differences)
        each = "it" if len(differences) == 1 else "them"
        ways = f"put {each} back, or start another run.name with init.from"
        if not STRICT & differences.keys():
            ways = f"put {each} back, start another run.name with init.from, or accept with resume.allow=[{keys}]"
        raise UserError(f"{source}: {', '.join(lines)}; {ways}")


def contradictions(recipe: Recipe, stored: Mapping[str, Any]) -> dict[str, str]:
    """Fixed fields that differ from a checkpoint's config and that resume.allow does not name: by key, both values."""
    return {key: line for key, line in _differences(recipe, stored).items() if not is_allowed(recipe, key)}


def _differences(recipe: Recipe, stored: Mapping[str, Any]) -> dict[str, str]:
    """By key, both values of each fixed field that differs from a checkpoint's config."""
    differing = fixed_differences(to_stored(recipe), stored, "checkpoint")
    return {
        key: f"{key} is {ours!r} in the recipe and {theirs!r} in the checkpoint"
        for key, (ours, theirs) in differing.items()
    }


def fixed_differences(one: Mapping[str, Any], other: Mapping[str, Any], source: str) -> dict[str, tuple[Any, Any]]:
    """By key, both values of each fixed field that differs between two stored configs; `source` names the second one.

    The entries of two lists are compared only if there are as many. Paths of sources are not compared: a moved folder
    is the same data, which the stream knows by its content.
    """
    ours = _fixed_values(one, Recipe)
    theirs = _fixed_values(without_secrets(complete(other, source)), Recipe)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    lists = tuple(f"{key}[" for key in keys if isinstance(ours.get(key), _ListLength))
    return {key: (ours.get(key), theirs.get(key)) for key in keys if not key.startswith(lists)}


def _rate_change(recipe: Recipe, stored: Mapping[str, Any], step: int) -> str:
    """How another train.steps moves the learning rate after `step`; empty if it does not."""
    before, now = complete(stored, "checkpoint")["train"]["steps"], recipe.train.steps
    if before == now or recipe.schedule.kind == "constant":
        return ""
    old, new = (learning_rate(step + 1, recipe.optimizer.lr, num, recipe.schedule) for num in (before, now))
    return (
        f"train.steps is {now} in the recipe and {before} in the checkpoint: the cosine now ends at step {now}, so the "
        f"learning rate of step {step + 1} is {new:.3g}, not {old:.3g}"
    )


def check_allowed_keys(recipe: Recipe, stored: Mapping[str, Any]) -> None:
    """Raise UserError if resume.allow names a key that neither the schema nor the checkpoint's config `stored` has."""
    known = {*_schema_keys(Recipe), *_dotted_keys(with_current_names(dict(stored)))}
    for name in recipe.resume.allow:
        if re.sub(r"\[\d+\]", "", current_key(name)) not in known:
            same_leaf = [key for key in sorted(known) if key.rpartition(".")[2] == name.rpartition(".")[2]]
            near = same_leaf or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise UserError(f"resume.allow names {name!r}, which is no key of a recipe; did you mean {near[0]}?")


def is_allowed(recipe: Recipe, key: str) -> bool:
    """Whether resume.allow names the key, or a section or list that it belongs to; old names count too. STRICT keys are
    never allowed."""
    allowed = [current_key(name) for name in recipe.resume.allow]
    return key not in STRICT and any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in allowed)


def _schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all sections and fields; of the entries of a list as in data.phases.steps."""
    for field in settings_of(schema):
        yield f"{prefix}{field.key}"
        if inner := field.section or field.element:
            yield from _schema_keys(inner, f"{prefix}{field.key}.")


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{prefix}{key}.")


class _ListLength(int):
    """Number of entries of a list of sections."""

    def __repr__(self) -> str:
        return f"a list of {int(self)}"


def _fixed_values(values: Mapping[str, Any], schema: type, prefix: str = "", rule: Rule = "fixed") -> dict[str, Any]:
    """Dotted key -> value of the fixed fields; entries of a list as in data.phases[0].steps, beside the list's length.

    A key that is not in the schema follows the rule of its section.
    """
    fields = {field.key: field for field in settings_of(schema, rule)}
    fixed: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is not None and field.section is not None:
            fixed |= _fixed_values(value, field.section, f"{prefix}{key}.", field.rule)
        elif field is not None and field.element is not None:
            if field.rule == "fixed":
                fixed[f"{prefix}{key}"] = _ListLength(len(value))
            for index, entry in enumerate(value):
                fixed |= _fixed_values(entry, field.element, f"{prefix}{key}[{index}].", field.rule)
        elif (field.rule if field is not None else rule) == "fixed":
            fixed[f"{prefix}{key}"] = value
    return fixed


def code_change(meta: Mapping[str, Any], current: str | None) -> str:
    """How the code differs from that which wrote a checkpoint, by git commit; empty where it does not or is unknown."""
    former = meta.get("commit")
    if not former or not current or (former == current and not former.endswith("+")):
        return ""
    if former == current:
        return f"the code had changes that no commit holds ({former}), and has some now: they may differ"
    return f"the code is that of commit {current} now, and was {former} when the checkpoint was written" + (
        " (+ means changes that no commit holds)" if "+" in former + current else ""
    )
