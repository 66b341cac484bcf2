"""Write what an operator finds out about each record into columns beside the shards; goes on where it stopped."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data_pipelines.commands.common_arguments import add_workers, check_workers, shard_folders
from emma_train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", metavar="OPERATOR", help="its name; that of your own with --operator")
    parser.add_argument("folders", nargs="+", type=Path, metavar="SHARDS", help="folders of shards with an index")
    parser.add_argument("--operator", dest="function", default="", metavar="PKG.MOD:FN", help="a function of yours")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="a setting of the operator"
    )
    add_job_arguments(parser)


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    add_workers(parser)
    parser.add_argument("--address", default="", help="of a Ray cluster; without it, processes of this machine")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.annotate import OperatorChoice, annotate_shard, annotate_tasks
    from data_pipelines.prepare.jobs import JobOptions, run_job, unfinished

    settings = parse_settings(arguments.settings)
    choice = OperatorChoice(arguments.operator, arguments.function, tuple(settings.items()))
    folders = [folder for path in arguments.folders for folder in shard_folders(path)]
    operator, tasks = choice.load(), annotate_tasks(folders, choice)
    if arguments.dry_run:
        rest, counts = unfinished(tasks)
        sys.stdout.write(
            f"{operator.name}: {len(tasks)} shards, {len(tasks) - len(rest)} finished ({counts.kept:,} records kept, "
            f"{counts.rejected:,} rejected), {len(rest)} to do with {sum(task.num_rows for task in rest):,} samples\n"
        )
        return 0
    options = JobOptions(check_workers(arguments), arguments.address, operator.cpus, operator.gpus)
    result = run_job(operator.name, tasks, annotate_shard, options)
    counts = result.counts
    sys.stdout.write(
        f"{operator.name}: {len(tasks)} shards ({result.finished_before} finished before), {counts.read:,} records "
        f"read, {counts.kept:,} kept, {counts.rejected:,} rejected\n"
    )
    return 1 if counts.read and not counts.kept else 0


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Values of --set by key; lists as tuples. Raises UserError."""
    import yaml

    settings = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: give key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            value = text
        settings[key] = tuple(value) if isinstance(value, list) else value
    return settings
