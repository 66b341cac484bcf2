"""Make one set: the commands of a recipe of data, in order; goes on where it stopped."""

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from emma_train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="such as recipes/data/stage0-llava-558k.yaml")
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE", help="values of its variables")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.data_recipe import load_data_recipe, run_steps

    overrides = {}
    for word in arguments.variables:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word}: give NAME=VALUE")
        overrides[name] = value
    recipe = load_data_recipe(arguments.recipe, overrides)
    parsed = {step: parse_step(step, arguments.build_parser) for step in recipe.steps}
    if arguments.dry_run:
        sys.stdout.writelines(f"emma-data {shlex.join(step)}\n" for step in recipe.steps)
        return 0

    def run_step(step: Sequence[str]) -> int:
        code: int = parsed[tuple(step)].run(parsed[tuple(step)])
        return code

    return run_steps(recipe, run_step)


def parse_step(step: Sequence[str], build: Callable[[], argparse.ArgumentParser]) -> argparse.Namespace:
    """The arguments of a step. Raises UserError where emma-data would not understand it."""
    message = io.StringIO()
    if step[0] == "run":
        raise UserError(f"{shlex.join(step)}: a recipe cannot run another one")
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return build().parse_args(list(step))
    except SystemExit:
        lines = message.getvalue().strip().splitlines() or ["it asks for help"]
        raise UserError(f"step {shlex.join(step)}: {lines[-1]}") from None
