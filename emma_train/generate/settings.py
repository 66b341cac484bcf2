"""Settings for generating images and text. An export holds them as generation.json, which people may edit;
`emma-train generate` uses them unless an option overrides them.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from emma_train.storage.files import write_atomic
from emma_train.storage.paths import StoragePath, as_local
from emma_train.storage.safetensors_io import read_json

SETTINGS_FILE = "generation.json"
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class FlowSettings:
    """How images are generated."""

    steps: int = 30
    """Steps from noise to image."""
    text_guidance: float = 2.5
    """Strength of the prompt; 1 turns guidance off."""
    image_guidance: float = 2.0
    """Strength of the reference image in editing; 1 turns it off."""
    shift: float = 1.0
    """Flow-time shift, as in training."""
    solver: str = "euler"
    """euler, or heun: second order, and two forwards a step but for the last."""
    guidance_from: float = 0.0
    """Flow time (1 is noise, 0 the image) above which there is guidance."""
    guidance_to: float = 1.0
    """Flow time up to which there is guidance."""
    guidance_renorm: bool = False
    """Scale the guided velocity of an image down to the norm of the one without guidance."""

    @classmethod
    def of(cls, recipe: Recipe) -> "FlowSettings":
        """Those of a recipe."""
        return cls(shift=recipe.flow.shift, **vars(recipe.generation))

    def guides(self, time: float) -> bool:
        """Whether there is guidance at a flow time."""
        return self.guidance_from < time <= self.guidance_to


@dataclass(frozen=True)
class TextSettings:
    """How text is generated."""

    max_tokens: int = 64
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    fixed_length: bool = False
    """Never stop early: every rank of a sharded model then runs as many forwards as the others."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""


NOT_STORED = ("fixed_length", "stop")
"""Settings of text that one call has and a model does not."""
Settings = TypeVar("Settings", FlowSettings, TextSettings)
ABOVE_0 = ("steps", "shift", "max_tokens")
HIGHEST = {
    "steps": 10_000,
    "text_guidance": 1000,
    "image_guidance": 1000,
    "shift": 1000,
    "guidance_from": 1,
    "guidance_to": 1,
    "max_tokens": 131_072,
    "temperature": 1000,
}
"""Upper bounds, those of a recipe where it has the field: far beyond use."""


def write_settings(folder: Path, flow: FlowSettings, text: TextSettings) -> None:
    """Write generation.json."""
    values = {"flow": asdict(flow), "text": {k: v for k, v in asdict(text).items() if k not in NOT_STORED}}
    write_atomic(folder / SETTINGS_FILE, json.dumps(values, indent=1) + "\n")


def read_settings(folder: StoragePath, recipe: Recipe) -> tuple[FlowSettings, TextSettings]:
    """The settings of an export; of a model that carries none, those of its recipe. Raises UserError."""
    path, flow, text = as_local(folder / SETTINGS_FILE), FlowSettings.of(recipe), TextSettings()
    if path is None or not path.is_file():
        return flow, text
    values = read_json(path)
    if unknown := sorted(values.keys() - {"flow", "text"}):
        raise UserError(f"{path}: unknown section {unknown[0]}; it has flow and text")
    return with_overrides(flow, values.get("flow", {}), f"{path}: flow."), with_overrides(
        text, values.get("text", {}), f"{path}: text."
    )


def with_overrides(settings: Settings, values: Mapping[str, Any], where: str) -> Settings:
    """The settings with other values; `where` stands before a key in errors. Raises UserError."""
    kinds = {f.name: type(getattr(settings, f.name)) for f in fields(settings)}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1) or list(kinds)
            raise UserError(f"{where}{key}: unknown key; did you mean {near[0]}?")
        wanted = (int, float) if kinds[key] is float else kinds[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and kinds[key] is not bool):
            raise UserError(f"{where}{key} is {value!r}; it is of type {kinds[key].__name__}")
        if key == "solver" and value not in SOLVERS:
            raise UserError(f"{where}{key} is {value!r}; it is one of {', '.join(SOLVERS)}")
        if key in ABOVE_0 and not value > 0:
            raise UserError(f"{where}{key} is {value}; it must be more than 0")
        if key in HIGHEST and not 0 <= value <= HIGHEST[key]:
            raise UserError(f"{where}{key} is {value}; it is a number from 0 to {HIGHEST[key]}")
    return replace(settings, **{key: kinds[key](value) for key, value in values.items()})
