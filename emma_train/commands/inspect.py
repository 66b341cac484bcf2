"""Say what a checkpoint is, whether it is whole to the byte, or copy it so that it stands alone."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emma_train.storage.paths import StoragePath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint, or a URL of one")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the metadata as JSON")
    output.add_argument(
        "--verify", action="store_true", help="read every byte of all checkpoints there; exit 1 on damage"
    )
    output.add_argument("--self-contained", metavar="OUT", help="copy the newest one, with its frozen weights, to OUT")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print a table of the checkpoint, or do what the option asks for. Returns 1 if --verify meets damage."""
    from emma_train.checkpoint.inspect import copy_self_contained
    from emma_train.errors import UserError
    from emma_train.export.export import META, is_export
    from emma_train.storage.paths import parse_path

    path = parse_path(arguments.checkpoint)
    if is_export(path):
        raise UserError(f"{path}: is an export, not a checkpoint; its {META} says what it was made from")
    if arguments.self_contained:
        print(copy_self_contained(path, parse_path(arguments.self_contained)))
        return 0
    if arguments.verify:
        return _verify(path)
    _print_metadata(path, arguments.json)
    return 0


def _verify(path: "StoragePath") -> int:
    """Print one line a checkpoint. Returns 1 if one of them is damaged."""
    from emma_train.checkpoint.inspect import verify_all

    problems = verify_all(path)
    for folder, problem in problems.items():
        print(f"{folder}: {problem or 'whole'}")
    return 1 if any(problems.values()) else 0


def _print_metadata(path: "StoragePath", as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from emma_train.checkpoint import folder as folders
    from emma_train.checkpoint.inspect import summary_rows

    checkpoint = folders.find_checkpoint(path, "CHECKPOINT")
    meta = folders.read_meta(checkpoint)
    assert meta is not None
    if as_json:
        print(json.dumps({k: v for k, v in meta.items() if k != "files"}, indent=1))
        return
    table = Table(title=str(checkpoint), show_header=False)
    for name, value in summary_rows(checkpoint, meta).items():
        table.add_row(name, value)
    Console().print(table)
