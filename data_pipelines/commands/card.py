"""Write one HTML page about a set: counts, licences, provenance, columns, removals, a contact sheet."""

import argparse
import sys
from pathlib import Path

from data_pipelines.commands.common_arguments import shard_folders
from emma_train.errors import check_range


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="SET", help="a folder of shards, or a selection")
    parser.add_argument("--out", type=Path, help="the page (default: card.html in the folder)")
    parser.add_argument("--images", type=int, default=24, help="of the contact sheet (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.card import card
    from emma_train.storage.files import output_file, write_atomic

    check_range("--images", arguments.images, 0, 500)
    for folder in shard_folders(arguments.folder):
        page = output_file("--out", arguments.out or folder / "card.html")
        write_atomic(page, card(folder, arguments.images))
        sys.stdout.write(f"{page}\n")
    return 0
