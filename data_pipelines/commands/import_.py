"""A public source -> WebDataset shards with index and manifest."""

import argparse

from data_pipelines.commands import import_fluent_emoji, import_format, import_shards
from data_pipelines.prepare.importers.catalogue import FORMATS

IMPORTERS = {
    "fluent-emoji": import_fluent_emoji,
    "shards": import_shards,
}
"""Modules like this one, by the name of the source. Sets that take SOURCE OUT are in FORMATS."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    for name, module in IMPORTERS.items():
        source = sources.add_parser(name, help=module.__doc__, description=module.__doc__)
        source.set_defaults(run_import=module.run)
        module.add_arguments(source)
    for name, form in FORMATS.items():
        source = sources.add_parser(name, help=form.help, description=f"{form.help}. {import_format.__doc__}")
        source.set_defaults(run_import=import_format.run, importer=name)
        import_format.add_arguments(source)


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.run_import(arguments)
    return code
