"""Write one self-contained HTML page about a run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder of a stage or a pipeline")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the path of the page."""
    from emma_train.report.report import write_report

    print(write_report(Path(arguments.run_folder)))
    return 0
