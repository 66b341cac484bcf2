"""A public source -> WebDataset shards with index and manifest."""

import argparse

from data_pipelines.commands import import_fluent_emoji, import_shards

IMPORTERS = {
    "fluent-emoji": import_fluent_emoji,
    "shards": import_shards,
}
"""Modules like this one, by the name of the source."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    for name, module in IMPORTERS.items():
        source = sources.add_parser(name, help=module.__doc__, description=module.__doc__)
        source.set_defaults(run_import=module.run)
        module.add_arguments(source)


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.run_import(arguments)
    return code
