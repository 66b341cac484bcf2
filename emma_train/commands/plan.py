"""Memory, throughput and batch arithmetic of a recipe, without a GPU."""

import argparse
import logging
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.errors import check_range

if TYPE_CHECKING:
    from emma_train.config.schema import Recipe, SourceConfig
    from emma_train.plan import Plan
    from emma_train.plan.samples import ReadIndexRows

log = logging.getLogger(__name__)
NUM_INDEX_SHARDS = 8
"""Shards of a source whose index is read: enough for means."""
INDEX_COLUMNS = ("size", "text_tokens", "supervised_tokens", "context", "target", "widths", "heights", "tags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file; key=value overrides may follow")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (%(default)s)")
    parser.add_argument("--gpu", default="h100-80g", help="kind of GPU, or the beginning of its name (%(default)s)")
    parser.add_argument("--mfu", type=float, help="measured share of the GPUs' peak; without, an estimate by module")
    parser.add_argument(
        "--network", type=float, default=400.0, metavar="GBITS", help="Gb/s of each GPU to other nodes (%(default)s)"
    )
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help="also build the model for N ranks of a process group that sends nothing, and count what a rank keeps and "
        "sends (replaces --gpus; no GPU, no memory for weights; fsdp only)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan of every stage, and of a pipeline their sum. Returns 1 if one of them cannot run there."""
    from emma_train.config.load import load_stages
    from emma_train.plan import Machine, print_plan, print_total
    from emma_train.plan.traffic import Network

    check_range("--gpus", arguments.gpus, 1, 10**6)
    if arguments.mfu is not None:
        check_range("--mfu", arguments.mfu, 0.001, 1)
    check_range("--network", arguments.network, 0.001, 10**6)
    check_range("--gpus-per-node", arguments.gpus_per_node, 1, 1024)
    network = Network(arguments.network, arguments.gpus_per_node)
    if arguments.simulate is not None:
        check_range("--simulate", arguments.simulate, 1, 10**4)
    num_gpus = arguments.gpus if arguments.simulate is None else arguments.simulate
    machine = Machine(num_gpus, arguments.gpu, arguments.mfu, network)
    stages = load_stages(Path(arguments.recipe), overrides)
    plans = []
    for file, recipe in stages:
        plans.append(print_plan(recipe, str(file), machine, index_reader(recipe)))
        if arguments.simulate is not None:
            _print_simulation(plans[-1][0], str(file), recipe)
    if len(plans) > 1:
        print_total([plan for plan, _ in plans])
    return max(code for _, code in plans)


def _print_simulation(plan: "Plan", source: str, recipe: "Recipe") -> None:
    from emma_train.plan.simulation_table import print_simulation
    from emma_train.training.optimizer import make_optimizer

    print_simulation(plan, source, partial(make_optimizer, config=recipe.optimizer))


def index_reader(recipe: "Recipe") -> "ReadIndexRows":
    """A function that reads the index rows of a source for a task, with `text_tokens` as the recipe lays them out.

    Where the recipe's tokenizer is not on disk, they are as the index has them.
    """
    from data_pipelines.shards.record import text_tokens_in_recipe
    from emma_train.sequence.tasks import TASKS
    from emma_train.sequence.tokens import TextTokenizer

    data, path = recipe.data, Path(recipe.data.tokenizer)
    exists = path.is_file() or (path / "tokenizer.json").is_file()
    tokenizer = TextTokenizer(path, data.template) if exists else None

    def read(source: "SourceConfig", task: str) -> list[dict[str, Any]] | None:
        rows = read_index_rows(source, TASKS[task].record_key)
        if rows is None or tokenizer is None:
            return rows
        text_tokens = text_tokens_in_recipe(TASKS[task], tokenizer, data.caption_questions)
        return [{**row, "text_tokens": text_tokens(row)} for row in rows]

    return read


@cache
def _log_assumed_sizes(path: str, task: str) -> None:
    """Say it once, however many phases and stages read the source."""
    log.info("%s: has no index; sizes of %s samples are assumed", path, task)


def read_index_rows(source: "SourceConfig", task: str) -> list[dict[str, Any]] | None:
    """Rows with the source's tags of its first shards' indexes; None where the source is not on disk."""
    from data_pipelines.planner.sources import has_wanted_tags
    from data_pipelines.shards.index import MANIFEST, read_columns, read_manifest

    if not (Path(source.path) / MANIFEST).is_file():
        _log_assumed_sizes(source.path, task)
        return None
    shards = read_manifest(source.path)["shards"][:NUM_INDEX_SHARDS]
    tables = [
        read_columns(source.path, shard["name"], task, INDEX_COLUMNS, version=shard["index_sha256"]) for shard in shards
    ]
    return [row for table in tables for row in table.to_pylist() if has_wanted_tags(source, row["tags"])]
