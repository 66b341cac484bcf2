"""Verify shards against their index and manifest; exit 1 on a difference."""

import argparse
import sys

from data_pipelines.commands.common_arguments import add_workers, check_workers, readable_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a path, or a URL that fsspec opens")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.check import check_folder

    workers, folders = check_workers(arguments), readable_folders(arguments.folder)
    problems = [f"{name}: {p}" for name, folder in folders.items() for p in check_folder(folder, workers)]
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{', '.join(folders)}: {f'{len(problems)} problems' if problems else 'as the index says'}\n")
    return 1 if problems else 0
