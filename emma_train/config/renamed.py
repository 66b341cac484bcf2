"""Config keys that were renamed, and what they are called now. Recipes and checkpoints may use either name."""

import logging
from typing import Any

log = logging.getLogger(__name__)
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


def with_current_names(values: Any, prefix: str = "") -> Any:
    """The same plain values with every renamed key under its current name."""
    if not isinstance(values, dict):
        return values
    return {
        RENAMED.get(f"{prefix}{key}", key): with_current_names(value, f"{prefix}{key}.")
        for key, value in values.items()
    }
