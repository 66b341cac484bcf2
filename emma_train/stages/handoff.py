"""Hand-off of weights from one stage to the next: a pure plan of what is loaded, new and dropped (contract 5)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emma_train.config.load import as_dict
from emma_train.config.schema import ModelConfig, Recipe, VisionConfig
from emma_train.config.setting import settings_of
from emma_train.config.stored import complete, keep_stored
from emma_train.errors import UserError
from emma_train.model.initial import cloned_from
from emma_train.model.parameter_groups import group_of

log = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


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
        """Log lines: how many tensors are loaded, new and dropped, with their parameter groups."""
        averaged = sum(stored.startswith("ema.") for stored in self.loaded.values())
        lines = [f"loaded {len(self.loaded)} tensors ({averaged} of them averaged weights)"]
        for title, names in (
            ("new, cloned", self.cloned),
            ("new, from the seed", self.initial),
            ("dropped", self.dropped),
        ):
            if names:
                groups = sorted({_group(name) for name in names})
                lines.append(f"{title}: {len(names)} tensors of {', '.join(groups)}")
        return lines


def plan_handoff(
    model: Shapes, stored: Shapes, vision: VisionConfig, use_ema: bool, source: str, gen_adapter: str = "random"
) -> HandOff:
    """Match the model's parameters with the stored tensors; `gen_adapter` is init.gen_adapter.

    Raises UserError on a shape that differs.
    """
    loaded: dict[str, str] = {}
    cloned: dict[str, str] = {}
    initial: list[str] = []
    for name, shape in model.items():
        candidates = [f"ema.{name}", f"model.{name}"] if use_ema else [f"model.{name}"]
        tensor = next((candidate for candidate in candidates if candidate in stored), None)
        if tensor is not None:
            if stored[tensor] != shape:
                raise UserError(
                    f"init.from {source}: {name} has shape {list(stored[tensor])} there and {list(shape)} in this "
                    "recipe; make the model section of both recipes agree"
                )
            loaded[name] = tensor
        elif (origin := cloned_from(name, vision.num_used_layers, vision.expert_layers)) is not None:
            cloned[name] = origin
        else:
            initial.append(name)
    if gen_adapter == "und":
        copies = {name: name.replace("gen_adapter.", "und_adapter.") for name in model if _group(name) == "gen_adapter"}
        cloned |= {name: origin for name, origin in copies.items() if origin in loaded}
        loaded = {name: tensor for name, tensor in loaded.items() if name not in cloned}
        initial = [name for name in initial if name not in cloned]
    dropped = [
        name.removeprefix("model.")
        for name in stored
        if name.startswith("model.") and name.removeprefix("model.") not in model
    ]
    return HandOff(loaded, cloned, initial, sorted(dropped))


def recipe_to_start(recipe: Recipe, stored: Mapping[str, Any]) -> Recipe:
    """The recipe to start a stage with from weights whose config is `stored`.

    A setting that the recipe does not set, and that must be equal (`handoff` in config/model_schema.py), takes the
    stored value. A log line names it.
    """
    source = f"init.from {recipe.init.source}"
    kept, lines = keep_stored(recipe, stored, source, lambda key, field: field.facts.handoff == "equal")
    for line in lines:
        log.info("%s: %s", source, line)
    return kept


def check_settings(stored: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise UserError if a setting that must be equal (`handoff` in config/model_schema.py) is not.

    Such a setting changes what the weights compute, often without changing their shapes. The order of a list is free.
    """
    source = f"init.from {recipe.init.source}"
    _check_equal(as_dict(recipe)["model"], complete(stored, source)["model"], ModelConfig, source)


def _check_equal(
    values: Mapping[str, Any], stored: Mapping[str, Any], schema: type, source: str, prefix: str = "model."
) -> None:
    for field in settings_of(schema):
        key, value, required = f"{prefix}{field.key}", values[field.key], stored[field.key]
        if field.section is not None:
            _check_equal(value, required, field.section, source, f"{key}.")
        elif field.facts.handoff == "equal" and _comparable(value) != _comparable(required):
            raise UserError(f"{source}: {key} is {required} there and {value} in this recipe; set {key}={required}")


def _comparable(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


def _group(name: str) -> str:
    try:
        return group_of(name)
    except KeyError:
        return name.split(".")[0]
