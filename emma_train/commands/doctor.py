"""What this machine can run, and what to install for the rest."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the table. Returns 1 if something essential is missing."""
    from emma_train.doctor import doctor

    return doctor()
