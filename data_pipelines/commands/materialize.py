"""Write the records of a selection as shards of their own."""

import argparse
import sys
from pathlib import Path

from data_pipelines.commands.common_arguments import add_job_arguments, check_workers, tokenizer_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("selection", type=Path, metavar="SELECTION", help="folder that `emma-data select` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with this selection")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, for the index")
    add_job_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.jobs import JobOptions
    from data_pipelines.prepare.materialize import materialize
    from data_pipelines.shards.index import read_manifest

    tokenizer, options = tokenizer_file(arguments.tokenizer), JobOptions(check_workers(arguments), arguments.address)
    if arguments.dry_run:
        manifest = read_manifest(arguments.selection)
        samples = ", ".join(f"{number:,} {task}" for task, number in manifest["samples"].items())
        sys.stdout.write(f"{arguments.selection}: {len(manifest['shards'])} shards, {samples}\n")
        return 0
    manifest = materialize(arguments.selection, arguments.out, tokenizer, options)
    sys.stdout.write(f"{arguments.out}: {len(manifest['shards'])} shards, {manifest['samples']}\n")
    return 0
