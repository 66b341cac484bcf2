"""What a data set holds."""

import argparse

from data_pipelines.commands.common_arguments import readable_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a path, or a URL that fsspec opens")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.shards.stats import details, folder_stats, overview

    stats_by_name = {name: folder_stats(folder) for name, folder in readable_folders(arguments.folder).items()}
    console = Console()
    console.print(overview(arguments.folder, stats_by_name))
    for name, stats in stats_by_name.items():
        console.print(f"\n[bold]{name}[/bold]")
        for table in details(stats):
            console.print(table)
    return 0
