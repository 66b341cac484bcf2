"""Tars of others, as they are: paths, URLs, pipe:COMMAND."""

import argparse
from pathlib import Path

from data_pipelines.commands.common_arguments import add_workers, check_workers, tokenizer_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with these sources")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="s3://b/set-{000..099}.tar, 'pipe:zcat old/{0..9}.tar.gz', ..."
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, for the index")
    add_workers(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.build_index import index_folder
    from data_pipelines.shards.fetch import fetch_shards

    tokenizer, workers = tokenizer_file(arguments.tokenizer), check_workers(arguments)
    provenance = fetch_shards(arguments.out, arguments.sources, workers)
    index_folder(arguments.out, tokenizer, provenance, workers)
    return 0
