"""What one stage hands to the next: a pure plan of what is loaded, new and dropped (contract 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emma_train.config.schema import ModelConfig, VisionConfig
from emma_train.errors import UserError
from emma_train.model.initial import cloned_from
from emma_train.stages.freeze import group_of

Shapes = Mapping[str, tuple[int, ...]]
SETTINGS = {
    "decoder": (
        "num_layers",
        "num_shared_layers",
        "shared",
        "heads",
        "kv_heads",
        "head_dim",
        "rope_theta",
        "eps",
        "tied",
    ),
    "vision": ("num_layers", "heads", "patch", "shuffle", "eps"),
}
"""What both models must agree on though shapes may not tell: a difference changes what the weights compute."""


@dataclass(frozen=True)
class HandOff:
    loaded: dict[str, str]
    """Parameter name -> stored tensor (model.NAME or ema.NAME)."""
    cloned: dict[str, str]
    """New parameter -> the parameter that it starts as a copy of."""
    initial: list[str]
    """New parameters that start from the recipe's seed."""
    dropped: list[str]
    """Stored parameters that this stage's model does not have."""

    def lines(self) -> list[str]:
        """What a person wants to read of it, by parameter group."""
        averaged = sum(stored.startswith("ema.") for stored in self.loaded.values())
        lines = [f"loaded {len(self.loaded)} tensors ({averaged} of them averaged weights)"]
        for what, names in (
            ("new, cloned", self.cloned),
            ("new, from the seed", self.initial),
            ("dropped", self.dropped),
        ):
            if names:
                groups = sorted({_group(name) for name in names})
                lines.append(f"{what}: {len(names)} tensors of {', '.join(groups)}")
        return lines


def plan_handoff(model: Shapes, stored: Shapes, vision: VisionConfig, use_ema: bool, source: str) -> HandOff:
    """Match the model's parameters with the stored tensors. Raises UserError on a shape that differs."""
    loaded, cloned, initial = {}, {}, []
    for name, shape in model.items():
        candidates = [f"ema.{name}", f"model.{name}"] if use_ema else [f"model.{name}"]
        found = next((c for c in candidates if c in stored), None)
        if found is not None:
            if stored[found] != shape:
                raise UserError(
                    f"init.from {source}: {name} has shape {list(stored[found])} there and {list(shape)} in "
                    f"this recipe; "
                    "make the model section of both recipes agree"
                )
            loaded[name] = found
        elif (origin := cloned_from(name, vision.num_layers, vision.expert_layers)) is not None:
            cloned[name] = origin
        else:
            initial.append(name)
    dropped = [
        name.removeprefix("model.")
        for name in stored
        if name.startswith("model.") and name.removeprefix("model.") not in model
    ]
    return HandOff(loaded, cloned, initial, sorted(dropped))


def check_settings(stored: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Raise UserError where the model section that the weights were made with differs in one of SETTINGS."""
    for section, keys in SETTINGS.items():
        for key in keys:
            there, here = stored[section][key], getattr(getattr(model, section), key)
            if there != here and not (key == "shared" and set(there) == set(here)):
                raise UserError(
                    f"init.from {source}: model.{section}.{key} is {there} there and {here} in this recipe; "
                    f"set model.{section}.{key}={there}"
                )


def _group(name: str) -> str:
    try:
        return group_of(name)
    except KeyError:
        return name.split(".")[0]
