"""What an ablation compares: arms of one recipe, each with every seed. Read from a YAML file."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emma_train.config.load import as_dict, load_stages, parse_yaml
from emma_train.config.schema import Recipe
from emma_train.config.stored import without_old_values
from emma_train.errors import UserError

KEYS = ("question", "recipe", "out", "seeds", "set", "evaluate", "metrics", "arms")
ARM_KEYS = ("recipe", "set", "evaluate")
DEFAULT_METRICS = ("val/loss/i2t", "val/loss/t2i", "val/answers")
MOST_SEEDS = 1000
NOT_TRAINED = ("run", "tracker", "profile")
"""Sections that say where a run is and who watches it."""


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    name: str
    recipe: Path
    """What it trains: a stage or a pipeline."""
    overrides: tuple[str, ...]
    """Of the recipe, as on the command line."""
    options: tuple[str, ...] | None
    """Of `emma-train evaluate`; None where the arm is validated alone."""


@dataclass(frozen=True)
class Ablation:
    """The first arm is the one with which the others are compared."""

    path: Path
    question: str
    out: str
    """File of the results; empty where the YAML names none."""
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    metrics: tuple[str, ...]
    """Those of the table."""


@dataclass(frozen=True)
class Trial:
    """One arm with one seed: a run, and perhaps its evaluation."""

    arm: Arm
    seed: int
    overrides: tuple[str, ...]
    """Of the recipe, all of them."""
    stages: tuple[Recipe, ...]
    """What is trained, in order."""
    folder: Path
    """Of the run, or of the pipeline."""
    recipe_hash: str
    """Of all values that say what is trained and scored, and not where."""

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def run_folder(self) -> Path:
        """Of the last stage."""
        last = self.stages[-1].run
        return Path(last.root) / last.name


def load_ablation(path: Path, overrides: Sequence[str] = ()) -> Ablation:
    """The ablation of a file, with further overrides of all arms. Raises UserError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the ablation ({error.strerror}); recipes/ablations has some") from None
    except ValueError as error:  # no UTF-8, or no YAML
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    values = _section(values, KEYS, str(path))
    if not values.get("arms"):
        raise UserError(f"{path}: arms is not given; recipes/ablations/causal.yaml has all keys")
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not all(type(s) is int and 0 <= s < 2**31 for s in seeds) or not seeds:
        raise UserError(f"{path}: seeds is {seeds!r}; it lists whole numbers, as in [0, 1, 2]")
    if len(set(seeds)) < len(seeds) or len(seeds) > MOST_SEEDS:
        raise UserError(f"{path}: seeds lists one twice, or more than {MOST_SEEDS}")
    metrics = values.get("metrics", list(DEFAULT_METRICS))
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics) or not metrics:
        raise UserError(f"{path}: metrics is {metrics!r}; it lists names, as in [{', '.join(DEFAULT_METRICS)}]")
    return Ablation(
        path=path,
        question=str(values.get("question", "")),
        out=str(values.get("out", "")),
        seeds=tuple(seeds),
        arms=_arms(values, overrides, path),
        metrics=tuple(metrics),
    )


def trials_of(ablation: Ablation, root: str) -> list[Trial]:
    """All trials, seed by seed, so that those of one seed are compared before the next one begins. Arms that train the
    same have the same run folder. Raises UserError where an arm is no valid recipe."""
    trials = []
    for seed in ablation.seeds:
        for arm in ablation.arms:
            # Equal seeds: equal initial weights by name, equal samples, and equal noise and flow time of each sample.
            overrides = (*arm.overrides, f"model.seed={seed}", f"data.seed={seed}")
            trained = _digest([str(arm.recipe), *sorted(overrides)])
            name = f"{arm.recipe.stem}-{trained}-seed{seed}"
            overrides += (f"run.root={json.dumps(root)}", f"run.name={name}")
            try:
                stages = tuple(recipe for _, recipe in load_stages(arm.recipe, list(overrides)))
            except UserError as error:
                raise UserError(f"{ablation.path}: arm {arm.name}: {error}") from None
            values = [_values(recipe, is_first=n == 0) for n, recipe in enumerate(stages)]
            trials.append(
                Trial(arm, seed, overrides, stages, Path(root) / name, _digest([values, arm.options], length=12))
            )
    return trials


def _values(recipe: Recipe, is_first: bool) -> dict[str, Any]:
    """What a stage trains, and not where its run folder is or who watches it."""
    values = as_dict(recipe)
    if not is_first:  # init.from is the run folder of the stage before
        values["init"] = {**values["init"], "from": None}
    # A key that a later version adds leaves the hash of a recipe without it as it is.
    return {key: value for key, value in without_old_values(values).items() if key not in NOT_TRAINED}


def _arms(values: Mapping[str, Any], overrides: Sequence[str], path: Path) -> tuple[Arm, ...]:
    arms, common = [], _settings(values.get("set"), f"{path}: set")
    if not isinstance(values["arms"], dict) or len(values["arms"]) < 2:
        raise UserError(
            f"{path}: arms names what is compared, two at least, as in {{causal: {{}}, full: {{set: ...}}}}"
        )
    for name, arm in values["arms"].items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", str(name)):
            raise UserError(f"{path}: arm {name!r}: a name has letters, digits, '-', '_' and '.'")
        arm = _section(arm or {}, ARM_KEYS, f"{path}: arm {name}")
        if not (recipe := arm.get("recipe") or values.get("recipe")):
            raise UserError(f"{path}: arm {name}: recipe is not given, here or for all arms; name a YAML file")
        of_arm = _settings(arm.get("set"), f"{path}: arm {name}: set")
        joined = {**common, **of_arm}
        words = tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in joined.items())
        options = _options(values, arm, f"{path}: arm {name}")
        arms.append(Arm(str(name), path.parent / str(recipe), (*words, *overrides), options))
    return tuple(arms)


def _options(values: Mapping[str, Any], arm: Mapping[str, Any], source: str) -> tuple[str, ...] | None:
    """Options of `emma-train evaluate`: those of all arms and those of this one; None where neither says `evaluate`."""
    if "evaluate" not in values and "evaluate" not in arm:
        return None
    joined = {
        **_settings(values.get("evaluate"), f"{source}: evaluate"),
        **_settings(arm.get("evaluate"), f"{source}: evaluate"),
    }
    words: list[str] = []
    for key, value in joined.items():
        words.append(f"--{key}")
        words += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return tuple(words)


def _settings(value: Any, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{source} is {value!r}; it maps dotted keys to values, as in {{train.steps: 100}}")
    return value


def _section(value: Any, keys: Sequence[str], source: str) -> dict[str, Any]:
    """A mapping whose keys are all known."""
    if not isinstance(value, dict):
        raise UserError(f"{source} is {value!r}; it has the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
            raise UserError(f"{source}: unknown key {key!r}; {advice}")
    return value


def _digest(value: Any, length: int = 8) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
