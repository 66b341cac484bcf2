"""Config keys that were renamed, and what they are called now. Recipes and checkpoints may use either name."""

from typing import Any

from emma_train.errors import UserError

RENAMED = {
    "model.vision.layers": "num_layers",
    "model.vision.mlp": "intermediate_size",
    "model.vision.table": "position_grid",
    "model.decoder.layers": "num_layers",
    "model.decoder.shallow": "num_shared_layers",
    "model.decoder.mlp": "intermediate_size",
    "optimizer.clip": "max_grad_norm",
    "train.sample_num": "num_samples",
}
"""Old dotted key -> new last part of the key. Since version 0.2.0."""


def current_key(key: str) -> str:
    """The current name of a dotted key."""
    if key not in RENAMED:
        return key
    return f"{key.rpartition('.')[0]}.{RENAMED[key]}"


def old_keys(values: Any, prefix: str = "") -> list[str]:
    """The old names among the dotted keys of plain values."""
    if not isinstance(values, dict):
        return []
    return [
        old
        for key, value in values.items()
        for old in ([f"{prefix}{key}"] if f"{prefix}{key}" in RENAMED else old_keys(value, f"{prefix}{key}."))
    ]


def with_current_names(values: Any, source: str = "config", prefix: str = "") -> Any:
    """The same plain values with every renamed key under its current name.

    Raises UserError if a key has one value under its old name and another one under its current name.
    """
    if not isinstance(values, dict):
        return values
    for key, value in values.items():
        old, name = f"{prefix}{key}", RENAMED.get(f"{prefix}{key}", key)
        if name != key and name in values and values[name] != value:
            new = current_key(old)
            raise UserError(
                f"{source}: {old} is now called {new}; both are set, to {value} and {values[name]}; keep {new}"
            )
    return {
        RENAMED.get(f"{prefix}{key}", key): with_current_names(value, source, f"{prefix}{key}.")
        for key, value in values.items()
    }
