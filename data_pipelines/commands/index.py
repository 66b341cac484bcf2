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
    names = parser.add_argument_group(
        "tars of others", "where their records have what; names are members, json:KEY, or several (png,jpg)"
    )
    names.add_argument("--caption", default="", metavar="NAME", help="a caption, such as json:caption")
    names.add_argument("--turns", default="", metavar="NAME", help="a conversation, such as json:conversations")
    names.add_argument("--source", default="", metavar="NAME", help="image that an edit starts from: src.jpg")
    names.add_argument("--target", default="", metavar="NAME", help="image to make: tgt.jpg")
    names.add_argument("--instruction", default="", metavar="NAME", help="text of an edit or prompt (txt, json:prompt)")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.build_index import index_folder
    from data_pipelines.shards.record_map import RecordMap

    tokenizer, workers = tokenizer_file(arguments.tokenizer), check_workers(arguments)
    fields = {name: getattr(arguments, name) for name in ("caption", "turns", "source", "target", "instruction")}
    record_map = RecordMap(**fields) if any(fields.values()) else None
    for folder in shard_folders(arguments.folder):
        index_folder(folder, tokenizer, workers=workers, force=arguments.again, record_map=record_map)
    return 0
