"""Write one self-contained HTML page about a run, or one that compares several."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", nargs="+", help="run folder of a stage or a pipeline; several: compared"
    )
    parser.add_argument("--out", type=Path, help="the page (RUN/report.html; of a comparison: compare.html)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the path of the page."""
    from emma_train.report.comparison import write_comparison
    from emma_train.report.report import write_report

    folders = [Path(folder) for folder in arguments.run_folder]
    if len(folders) > 1:
        print(write_comparison(folders, arguments.out or Path("compare.html")))
    else:
        print(write_report(folders[0], arguments.out))
    return 0
