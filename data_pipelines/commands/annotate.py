"""Write what an operator finds out about each record into columns beside the shards; goes on where it stopped."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.commands.common_arguments import (
    add_gpus,
    add_job_arguments,
    check_gpus,
    check_workers,
    shard_folders,
)
from emma_train.errors import UserError

if TYPE_CHECKING:
    from data_pipelines.prepare.jobs import JobResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", metavar="OPERATOR", help="its name; with --operator, a name for your function")
    parser.add_argument("folders", nargs="+", type=Path, metavar="SHARDS", help="folders of shards with an index")
    parser.add_argument("--operator", dest="function", default="", metavar="PKG.MOD:FN", help="a function of yours")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="a setting of the operator"
    )
    add_job_arguments(parser)
    add_gpus(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.annotate import OperatorChoice, annotate_shard, annotate_tasks
    from data_pipelines.prepare.jobs import JobOptions, run_job, unfinished

    settings = parse_settings(arguments.settings)
    if arguments.operator == "duplicates" and not arguments.function:
        return _run_duplicates(arguments, settings)
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
    gpus = check_gpus(arguments, operator.gpus)
    options = JobOptions(check_workers(arguments), arguments.address, operator.cpus, gpus)
    return _report(operator.name, run_job(operator.name, tasks, annotate_shard, options))


def _run_duplicates(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    from data_pipelines.prepare.duplicates import DUPLICATES, duplicate_tasks, find_duplicates
    from data_pipelines.prepare.jobs import unfinished
    from data_pipelines.prepare.select_rows import EngineLimits

    max_bits = DUPLICATES.with_settings(settings).settings["max_bits"]
    folders = [folder for path in arguments.folders for folder in shard_folders(path)]
    if arguments.dry_run:
        tasks = duplicate_tasks(folders, max_bits)
        sys.stdout.write(f"duplicates: {len(tasks)} shards, {len(unfinished(tasks)[0])} to do\n")
        return 0
    return _report("duplicates", find_duplicates(folders, max_bits, EngineLimits(threads=check_workers(arguments))))


def _report(name: str, result: "JobResult") -> int:
    """Say what a job did; returns 1 if it kept no record."""
    counts, num_shards = result.counts, result.finished_before + result.finished_now
    sys.stdout.write(
        f"{name}: {num_shards} shards ({result.finished_before} finished before), {counts.read:,} records read, "
        f"{counts.kept:,} kept, {counts.rejected:,} rejected\n"
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
