"""Start or submit a run; prints the exact command or script."""

import argparse
from pathlib import Path

from launchers import add_launch_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launch_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Start torchrun or submit the job. The recipe is loaded here too: a mistake in it costs no time in a queue."""
    from emma_train.config.load import is_pipeline, load_pipeline, load_recipe
    from launchers import LaunchOptions, launch

    path = Path(arguments.recipe)
    run_config = (load_pipeline(path, overrides)[0] if is_pipeline(path) else load_recipe(path, overrides)).run
    logs = Path(run_config.root) / run_config.name / "logs"
    return launch(str(path), overrides, LaunchOptions.from_arguments(arguments), logs)
