"""Recipes of data: the commands that make one set, in order, in a YAML file.

    variables: {source: downloads/LLaVA-Pretrain, tokenizer: models/qwen3-4b, internal: ""}
    out: data/stage0/llava-558k
    steps:
      - import llava-pretrain {source} {out} --tokenizer {tokenizer}
      - {if: internal, do: "import folder {internal} {out}-internal --tokenizer {tokenizer}"}
      - card {out}

Each step is an emma-data command without its name. {NAME} is the value of a variable, which the command line may set
(`source=...`), or {out}; a value with spaces stays one word. A step with `if` is left out where that variable is empty.
"""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emma_train.errors import UserError
from emma_train.storage.files import make_folder, write_atomic

log = logging.getLogger(__name__)
STATE_FOLDER = ".steps"
"""Folder in the parent of `out` with a file for each set that says which of its steps are finished."""


@dataclass(frozen=True)
class DataRecipe:
    """The steps of a set, as lists of words."""

    out: Path
    steps: tuple[tuple[str, ...], ...]

    @property
    def state_file(self) -> Path:
        return self.out.parent / STATE_FOLDER / f"{self.out.name}.json"


def load_data_recipe(path: Path, overrides: Mapping[str, str]) -> DataRecipe:
    """Read a recipe and put values in the place of variables. Raises UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or set(values) - {"variables", "out", "steps"} or "out" not in values:
        raise UserError(f"{path}: must have the keys variables, out and steps")
    variables = {name: "" if value is None else str(value) for name, value in (values.get("variables") or {}).items()}
    if unknown := [name for name in overrides if name not in (*variables, "out")]:
        raise UserError(f"{path}: has no variable {unknown[0]}; it has out, {', '.join(variables)}")
    variables |= {"out": str(values["out"])} | dict(overrides)
    steps = []
    for number, step in enumerate(values.get("steps") or [], 1):
        where = f"{path}: step {number}"
        text, needed = (step.get("do"), step.get("if")) if isinstance(step, dict) else (step, None)
        if not isinstance(text, str) or (needed is not None and needed not in variables):
            raise UserError(f"{where}: must be a text, or {{if: VARIABLE, do: text}} with a variable of the recipe")
        if needed is None or variables[needed]:
            steps.append(_words(text, variables, where))
    if not steps:
        raise UserError(f"{path}: has no steps")
    return DataRecipe(Path(variables["out"]), tuple(steps))


def run_steps(recipe: DataRecipe, run_step: Callable[[Sequence[str]], int]) -> int:
    """Run the steps that are not finished, in order; returns the exit code of the first that fails, or 0.

    A step is finished if it, with all steps before it, ran to its end with the same words.
    """
    finished = _finished(recipe)
    for number, step in enumerate(recipe.steps):
        if number < finished:
            log.info("step %d of %d is finished: %s", number + 1, len(recipe.steps), shlex.join(step))
            continue
        log.info("step %d of %d: emma-data %s", number + 1, len(recipe.steps), shlex.join(step))
        if code := run_step(step):
            log.error(
                "step %d of %d ended with exit code %d; run this again, it goes on", number + 1, len(recipe.steps), code
            )
            return code
        make_folder(recipe.state_file.parent)
        write_atomic(recipe.state_file, json.dumps({"finished": _hashes(recipe)[: number + 1]}) + "\n")
    return 0


def _finished(recipe: DataRecipe) -> int:
    """Number of steps that are finished."""
    try:
        known = json.loads(recipe.state_file.read_text())["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    number = 0
    for one, other in zip(known, _hashes(recipe), strict=False):
        if one != other:
            break
        number += 1
    return number


def _hashes(recipe: DataRecipe) -> list[str]:
    return [hashlib.sha256(shlex.join(step).encode()).hexdigest()[:16] for step in recipe.steps]


def _words(text: str, variables: Mapping[str, Any], where: str) -> tuple[str, ...]:
    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise UserError(f"{where}: there is no variable {match[1]}; there are {', '.join(variables)}")
        return str(variables[match[1]])

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    replaced = [(word, re.sub(r"\{(\w+)\}", value, word)) for word in words]
    return tuple(new for word, new in replaced if new or not word)  # a word that is an empty variable disappears
