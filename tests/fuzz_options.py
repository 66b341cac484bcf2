"""Wrong values for every option and argument of emma-train and emma-data, each tried in a process of its own.

option_cases()    every option and positional of every command x every wrong value, from the argparse parsers
try_case(case)    `refused` in one line with exit code 2 (1 where a file cannot be read), `done`, or what went wrong

    python -m tests.fuzz_options [PART OF A NAME]      try all and print the counts for docs/reliability.md
"""

import argparse
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.cli import build_parser
from emma_train import cli
from tests.fuzz_inputs import AUTOENCODER, SOURCES, TOKENIZER, Command, make_inputs, problem_of, try_command

log = logging.getLogger(__name__)
VALUES = {
    "wrong type": "word",
    "zero": "0",
    "negative": "-1",
    "huge": str(10**18),
    "nan": "nan",
    "inf": "inf",
    "empty": "",
    "gone": "no/such/file",
    "folder": "folder",
    "file": "file",
}
EXPRESSION = {"unclosed": "('", "several": "1; 2", "null": "NULL"}
MORE_VALUES = {
    **dict.fromkeys(("--where", "--per", "--balance", "--spread", "--best", "--tag", "--captions"), EXPRESSION),
    "--map": {
        "no field of ours": "colour=how",
        "no field of theirs": "text=colour",
        "half": "text=",
        "unclosed": "text=json[",
        "no index": "text=json[0][[]",
    },
}
"""Further values of options that take SQL or FIELD=NAME."""
RIGHT = ("refused", "done")
ENDLESS = ("--watch",)
"""Switches of commands that run until they are interrupted."""
LEGAL_LINE = "legal"
"""The name of the case in which no value is wrong."""
IMAGE = {"--prompt": ["a cat"], "--task": ["t2i"], "--steps": ["1"], "--size": ["32", "32"]}
LEGAL: dict[str, dict[str, list[str]]] = {
    "emma-train train": {"recipe": ["recipe.yaml"]},
    "emma-train plan": {"recipe": ["recipe.yaml"], "--gpus": ["2"]},
    "emma-train import": {
        "out": ["out"],
        "--llm": ["llm"],
        "--vision": ["vision"],
        "--autoencoder": ["autoencoder"],
    },
    "emma-train inspect": {"checkpoint": ["runs/micro"]},
    "emma-train export": {"checkpoint": ["runs/micro"], "out": ["out"]},
    "emma-train generate": {"model": ["export"], "--device": ["cpu"], **IMAGE},
    "emma-train evaluate": {"model": ["export"], "--device": ["cpu"], "--data": ["prompts"], "--limit": ["1"]},
    "emma-train report": {"run_folder": ["runs/micro"]},
    "emma-train status": {"run_folder": ["runs/micro"]},
    "emma-train audit": {"run_folder": ["runs/micro"]},
    "emma-train ablate": {"ablation": ["ablation.yaml"], "--dry-run": [], "--out": ["results.jsonl"]},
    "emma-train config": {},
    "emma-train doctor": {},
    "emma-train launch": {"recipe": ["recipe.yaml"], "--dry-run": []},
    "emma-data import fluent-emoji": {
        "out": ["out"],
        "--package": ["package"],
        "--unicode-table": ["package/data-by-emoji.json"],
        "--world": ["tiny"],
        "--size": ["32"],
        "--samples": ["1", "1", "1"],
    },
    "emma-data import shards": {
        "out": ["out"],
        "sources": ["shards/shard-000000.tar"],
        "--tokenizer": [TOKENIZER],
        "--workers": ["1"],
    },
    "emma-data annotate": {"operator": ["size"], "folders": ["shards"], "--workers": ["1"]},
    "emma-data synthesize": {
        "name": ["rendered-text"],
        "source": ["file"],
        "out": ["out"],
        "--tokenizer": [TOKENIZER],
        "--workers": ["1"],
    },
    "emma-data select": {"out": ["out"], "--from": ["shards"], "--threads": ["1"]},
    "emma-data materialize": {
        "selection": ["selection"],
        "out": ["out"],
        "--tokenizer": [TOKENIZER],
        "--workers": ["1"],
    },
    "emma-data card": {"folder": ["shards"]},
    "emma-data run": {"recipe": ["data.yaml"]},
    "emma-data index": {"folder": ["shards"], "--tokenizer": [TOKENIZER], "--workers": ["1"]},
    "emma-data cache-latents": {"folder": ["shards"], "--autoencoder": [AUTOENCODER], "--side": ["64"]},
    "emma-data check": {"folder": ["shards"], "--workers": ["1"]},
    "emma-data stats": {"folder": ["shards"]},
}
"""Values with which each command runs, by option or name of the positional."""
IMPORTER = {"out": ["out"], "--tokenizer": [TOKENIZER], "--workers": ["1"]}
"""The same of the importers of public formats, beside their source."""
EDIT_MAP = {"--map": ["source=before", "target=after", "instruction=how"]}
LEGAL |= {f"emma-data import {name}": {"source": [f"formats/{name}"], **IMPORTER} for name in SOURCES}
LEGAL["emma-data import hf-parquet"] |= EDIT_MAP
BENCHMARK = {
    "--benchmark": ["geneval"],
    "--data": ["geneval"],
    "--out": ["out"],
    "--steps": ["1"],
    "--size": ["32", "32"],
}
BENCHMARK_OPTIONS = (
    "--check",
    "--score",
    "--rewrite",
    "--rewrite-model",
    "--batch",
    "--size",
    "--data",
    "--out",
    "--limit",
)
"""Options that are tried with the images of a benchmark."""
ALSO = {
    "slurm": {"--on": ["slurm"]},
    "--image": {"--task": ["it2i"]},
    "emma-train generate --image-guidance": {"--task": ["it2i"], "--image": ["image.png"]},
    "--temperature": {"--task": ["i2t"], "--image": ["image.png"], "--max-tokens": ["4"]},
    "--max-tokens": {"--task": ["i2t"], "--image": ["image.png"]},
    "--per": {"--top": ["1"]},
    "--captions": {"--tokenizer": [TOKENIZER]},
    **{f"emma-train evaluate {option}": BENCHMARK for option in BENCHMARK_OPTIONS},
    "emma-data select --tokenizer": {"--captions": ["key"]},
}
"""What else an option, or one of a command, needs to have an effect."""


@dataclass(frozen=True)
class Case:
    """An option of a command, and a value for it."""

    command: str
    """With its program: emma-train generate."""
    option: str
    """Or the name of a positional."""
    name: str
    """What is wrong with the value."""
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.command} {self.option}={self.name}" if self.option else f"{self.command} {self.name}"


def option_cases() -> list[Case]:
    """Every option and positional of every command with every wrong value; a switch is given once. Before them, for
    every command, its legal values."""
    return [case for name, parser in commands() for case in _cases_of(name, parser)]


def _cases_of(command: str, parser: argparse.ArgumentParser) -> Iterator[Case]:
    yield Case(command, "", LEGAL_LINE, _argv(command, parser, LEGAL[command]))
    for action in options_of(parser):
        yield from _cases(command, parser, action)


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command, by its name with the program's, and its parser."""
    yield from _leaves("emma-train", cli._parser(list(cli.COMMANDS)))
    yield from _leaves("emma-data", build_parser())


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def name_of(action: argparse.Action) -> str:
    """--option, or the name of a positional."""
    return action.option_strings[-1] if action.option_strings else action.dest


def _leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subparsers:
        yield name, parser
    for action in subparsers:
        for word, subparser in action.choices.items():
            yield from _leaves(f"{name} {word}", subparser)


def _cases(command: str, parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[Case]:
    option = name_of(action)
    if option in ENDLESS:
        return
    legal = LEGAL[command] | ALSO.get(option, {}) | ALSO.get(f"{command} {option}", {})
    if command.endswith("launch") and any(action in group._group_actions for group in _slurm_groups(parser)):
        legal |= ALSO["slurm"]
    if action.nargs == 0:
        yield Case(command, option, "given", _argv(command, parser, legal | {option: []}))
        return
    for name, value in {**VALUES, **MORE_VALUES.get(option, {})}.items():
        num = action.nargs if isinstance(action.nargs, int) else 1
        yield Case(command, option, name, _argv(command, parser, legal | {option: [value] * num}))


def _slurm_groups(parser: argparse.ArgumentParser) -> list[argparse._ArgumentGroup]:
    return [group for group in parser._action_groups if group.title and "slurm" in group.title]


def _argv(command: str, parser: argparse.ArgumentParser, values: dict[str, list[str]]) -> tuple[str, ...]:
    """The words after the program's name: positionals first, since an option may take several values."""
    positionals = [word for a in parser._actions if not a.option_strings for word in values.get(name_of(a), [])]
    options = [word for name, given in values.items() if name.startswith("-") for word in _option(name, given)]
    return (*command.split()[1:], *positionals, *options)


def _option(name: str, values: list[str]) -> list[str]:
    """--option=value for one value, so that a negative number is none of argparse's options."""
    return [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]


def try_case(case: Case, inputs: Path) -> str:
    """Run the command in a copy of the inputs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "inputs"
        shutil.copytree(inputs, folder, copy_function=shutil.copyfile)
        module = "emma_train" if case.command.startswith("emma-train") else "data_pipelines"
        ended = try_command(Command(list(case.argv), module), folder)
        if (problem := problem_of(ended)) or (ended.code == 1 and not ended.is_one_line):
            return problem or f"exit code 1: {ended.err[-1000:]}{ended.out[-300:]}"
        if case.name == LEGAL_LINE and ended.code != 0:
            return f"legal values are refused: {ended.err[-1000:]}"
        return "done" if ended.code == 0 else "refused"


def try_all(cases: Iterable[Case], inputs: Path) -> dict[str, str]:
    """The result of every case by its text; two are tried at a time."""
    cases, results = list(cases), {}
    with ThreadPoolExecutor(2) as pool:
        for case, result in zip(cases, pool.map(lambda case: try_case(case, inputs), cases), strict=True):
            results[str(case)] = result
            if result not in RIGHT:
                log.info("%s: %s", case, result)
    return results


def main(part: str) -> int:
    """Print counts and every problem. Returns 1 if there is one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        inputs = make_inputs(Path(temporary) / "inputs")
        start = time.monotonic()
        results = try_all((case for case in option_cases() if part in str(case)), inputs)
    counts = Counter(result if result in RIGHT else "wrong" for result in results.values())
    for name, result in results.items():
        if result == "done":
            sys.stdout.write(f"{name}: {result}\n")
    sys.stdout.write(f"{len(results)} cases: {dict(counts)}, {time.monotonic() - start:.0f} s\n")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
