"""Write the index and manifest of a folder of shards; goes on where it stopped."""

import argparse
from pathlib import Path

from data_pipelines.commands.common_arguments import add_workers, check_workers, shard_folders, tokenizer_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, as data.tokenizer"
    )
    add_workers(parser)
    parser.add_argument("--again", action="store_true", help="also shards whose index is valid")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.build_index import index_folder

    tokenizer, workers = tokenizer_file(arguments.tokenizer), check_workers(arguments)
    for folder in shard_folders(arguments.folder):
        index_folder(folder, tokenizer, workers=workers, force=arguments.again)
    return 0
