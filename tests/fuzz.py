"""Wrong values for every config field and command-line option, each tried in a process of its own.

recipe_cases()     every field of the schema x every wrong value
try_recipe(case)   train the micro model of tests/assets/e0297de for three steps with that value, in 4 GiB of addresses
try_command(...)   run any command in the same way

    python -m tests.fuzz [PART OF A KEY]      try the recipe cases and print the counts for docs/reliability.md
"""

import contextlib
import copy
import json
import logging
import math
import os
import resource
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from emma_train.config.load import load_stages, load_yaml
from emma_train.config.schema import Recipe
from emma_train.config.setting import Setting, settings_of
from emma_train.errors import UserError
from emma_train.stages.stage import stage_of
from tests.distributed.spawn import fork_server, run_ranks
from tests.helpers import ASSETS, ROOT

log = logging.getLogger(__name__)
MEMORY = 4 << 30
STEPS = 3
TIMEOUT_S = 600
"""Long, so that a busy machine makes no hang; a run takes a second."""
VALUES: dict[str, Any] = {
    "wrong type": "word",
    "zero": 0,
    "one": 1,
    "negative": -1,
    "huge": 10**18,
    "nan": math.nan,
    "inf": math.inf,
    "empty": "",
    "null": None,
    "list": [1, 2],
    "mapping": {"a": 1},
    "empty list": [],
}
LONG_TEXT = "x" * 5000
LISTED: dict[str, dict[str, Any]] = {"skip_steps": {"first": 2, "last": 2}}
"""A legal entry of each list of sections; of all others, a source of data."""
NOT_TRIED = {"engine.compile": (1,), "health.skip_steps[].first": (1,)}
"""Values that are right but take minutes: compiling."""


@dataclass(frozen=True)
class Case:
    """A field and a value for it."""

    key: str
    """Dotted key; [] stands for the first entry of a list."""
    name: str
    """What is wrong with the value."""
    value: Any

    def __str__(self) -> str:
        return f"{self.key}={self.name}"


def recipe_cases() -> list[Case]:
    """Every field of a recipe with every wrong value; lists and mappings also with wrong entries."""
    return [case for key, field in _fields(Recipe) for case in _cases(key, field)]


def _cases(key: str, field: Setting) -> Iterator[Case]:
    kinds, shape = {field.kind, *typing.get_args(field.kind)}, typing.get_origin(field.kind)
    names = ["wrong type", "empty", "null", "list", "mapping", "empty list"]
    if kinds & {int, float, bool}:
        names = [*VALUES]
    for name in [*names, "long text"] if str in kinds else names:
        value = VALUES.get(name, LONG_TEXT)
        if value not in NOT_TRIED.get(key, ()):
            yield Case(key, name, value)
        if shape is list:
            yield Case(key, f"[{name}] * 2", [value, value])
        if shape is dict:
            yield Case(key, f"{{vision: {name}}}", {"vision": value})


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """(key, field) of every section and field, and of those in the entries of lists."""
    for field in settings_of(schema):
        key = f"{prefix}{field.key}"
        yield key, field
        if field.section is not None:
            yield from _fields(field.section, f"{key}.")
        elif field.element is not None:
            yield from _fields(field.element, f"{key}[].")


def micro_recipe(folder: Path) -> dict[str, Any]:
    """Values of the micro recipe for three steps in `folder`, with absolute paths."""
    values = copy.deepcopy(_micro_values())
    values["run"]["root"] = str(folder / "runs")
    values["model"]["autoencoder"]["path"] = str(ASSETS / "autoencoder")
    values["data"]["tokenizer"] = str(ASSETS / "tokenizer")
    values["data"]["sources"][0]["path"] = str(ASSETS / "emoji" / "train")
    values["train"] |= {"steps": STEPS, "save_every": STEPS}
    return values


@lru_cache(maxsize=1)
def _micro_values() -> dict[str, Any]:
    return load_yaml(ROOT / "tests" / "assets" / "e0297de" / "recipe.yaml")


def with_value(values: dict[str, Any], case: Case) -> dict[str, Any]:
    """The same values with that of the case."""
    if case.key.startswith("data.phases[]"):
        phase = {"name": "a", "steps": STEPS, "mix": {"i2t": 1, "t2i": 1, "it2i": 1}}
        values["data"]["phases"] = [{**phase, "sources": copy.deepcopy(values["data"]["sources"])}]
    section: Any = values
    *parents, leaf = case.key.split(".")
    for parent in parents:
        name = parent.removesuffix("[]")
        entries = [copy.deepcopy(LISTED.get(name) or values["data"]["sources"][0])]
        section = section.setdefault(name, entries if parent.endswith("[]") else {})
        section = section[0] if parent.endswith("[]") else section
    section[leaf] = case.value
    return values


def _write_recipe(path: Path, case: Case) -> None:
    values = with_value(micro_recipe(path.parent), case)
    path.write_text(yaml.dump(values, Dumper=yaml.CSafeDumper, allow_unicode=True))


def check_recipe_case(case: Case) -> str:
    """`refused` or `passed` by the checks before training, or what went wrong with a case."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "recipe.yaml"
        _write_recipe(path, case)
        try:
            for file, recipe in load_stages(path):
                stage_of(recipe, str(file))
        except UserError as error:
            return f"several lines: {error}" if "\n" in str(error) or len(str(error)) > 1000 else "refused"
        except Exception:
            return traceback.format_exc()
        return "passed"


def try_recipe(case: Case, timeout_s: float = TIMEOUT_S) -> str:
    """`refused`, `trained`, or what went wrong with a case; in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "recipe.yaml"
        _write_recipe(path, case)
        result = try_command(["train", str(path)], folder, timeout_s)
        if result != "done":
            return result
        (metrics,) = folder.rglob("metrics.jsonl")
        return _trained(metrics, 1 if case.key == "train.steps" else STEPS)


def _trained(metrics: Path, num_steps: int) -> str:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    finite = [math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines]
    return "trained" if len(lines) == num_steps and all(finite) else f"steps that are not finite, or too few: {lines}"


def try_command(argv: list[str], folder: Path, timeout_s: float = 60, module: str = "emma_train") -> str:
    """`refused`: one line and exit code 2; `done`: exit code 0; or else what went wrong."""
    try:
        (outcome,) = run_ranks(1, limited_command, argv, str(folder), module, timeout_s=timeout_s)
    except AssertionError as error:
        return str(error)
    code, message = outcome.value, [line for line in outcome.error_lines if not line.startswith(("usage:", "  "))]
    if "Traceback" in outcome.err or code not in (0, 2):
        return f"exit code {code}: {outcome.err[-2000:]}"
    if code == 2 and len([line for line in message if " [0] " not in line]) != 1:
        return f"not one line: {outcome.err[-2000:]}"
    return "done" if code == 0 else "refused"


def limited_command(argv: list[str], folder: str, module: str) -> int:
    """A command in this process, with its working directory in `folder` and a limit of its addresses."""
    from data_pipelines import cli as data_cli
    from emma_train import cli

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.suppress(SystemExit):
        return (cli if module == "emma_train" else data_cli).main(argv)
    return 2


def try_all(cases: Iterable[Case]) -> dict[str, str]:
    """The result of every case by its text, two at a time. What passes the checks is tried in a process of its own."""
    cases = list(cases)
    with ProcessPoolExecutor(2, mp_context=fork_server()) as processes:
        checked = processes.map(check_recipe_case, cases, chunksize=16)
        results = {str(case): (case, result) for case, result in zip(cases, checked, strict=True)}
    passed = [case for case, result in results.values() if result == "passed"]
    tried = {}
    with ThreadPoolExecutor(2) as pool:
        for case, result in zip(passed, pool.map(try_recipe, passed), strict=True):
            tried[str(case)] = result
            log.info("%s: %s", case, result)
    return {name: result for name, (_, result) in results.items()} | tried


def main(part: str) -> int:
    """Print counts and every problem. Returns 1 if there is one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    results = try_all(case for case in recipe_cases() if part in case.key)
    counts = Counter(result if result in ("refused", "trained") else "wrong" for result in results.values())
    for name, result in sorted(results.items(), key=lambda item: item[1]):
        if result != "refused":
            sys.stdout.write(f"{name}: {result}\n")
    sys.stdout.write(f"{len(results)} cases: {dict(counts)}, {time.monotonic() - start:.0f} s\n")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
