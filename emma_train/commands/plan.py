"""Memory, throughput and batch arithmetic of a recipe, without a GPU."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file; key=value overrides may follow")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (%(default)s)")
    parser.add_argument("--gpu", default="h100-80g", help="kind of GPU (%(default)s)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan of every stage. Returns 1 if one of them does not fit into the GPUs' memory."""
    from emma_train.config.load import load_stages
    from emma_train.plan import print_plan

    stages = load_stages(Path(arguments.recipe), overrides)
    return max(print_plan(recipe, str(file), arguments.gpus, arguments.gpu) for file, recipe in stages)
