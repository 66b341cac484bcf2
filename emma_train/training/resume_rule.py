"""The resume rule: which recipe fields may differ from a checkpoint's when a run goes on."""

from typing import Any

from emma_train.config.load import as_dict
from emma_train.config.renamed import with_current_names
from emma_train.config.schema import Recipe

CHANGEABLE = (
    "run.",
    "train.",
    "tracker.",
    "engine.",
    "attention.",
    "init.",
    "ema.device",
    "resume.",
    "data.workers",
    "data.prefetch",
    "data.max_bad_samples",
    "data.cache_",
    "data.read_",
)
"""What may differ when a run is resumed: it does not change what is learnt from which data."""


def contradictions(recipe: Recipe, stored: dict[str, Any]) -> list[str]:
    """Recipe fields that differ from a checkpoint's config and matter to what is learnt, with both values."""
    mine, theirs = _flat(as_dict(recipe)), _flat(with_current_names(stored))
    found = []
    for key in sorted(mine.keys() | theirs.keys()):
        allowed = key.startswith(CHANGEABLE) or any(key == a or key.startswith(f"{a}.") for a in recipe.resume.allow)
        if not allowed and mine.get(key) != theirs.get(key):
            found.append(f"{key} is {mine.get(key)!r} in the recipe and {theirs.get(key)!r} in the checkpoint")
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
