"""Print the keys that a recipe may set: type, default, range, meaning, and whether a resume may change them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", metavar="SECTION", nargs="?", default="", help="a section or key, such as data.und")
    parser.add_argument("--markdown", action="store_true", help="print it as Markdown, as docs/config.md has it")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the reference of all sections, or of one."""
    import shutil

    from emma_train.config.reference import as_markdown, as_text, tables

    reference = tables(arguments.section)
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(as_markdown(reference) if arguments.markdown else as_text(reference, width), end="")
    return 0
