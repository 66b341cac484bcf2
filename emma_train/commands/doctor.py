"""What this machine can run, and what to install for the rest; with --nodes, what nodes can do together."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", action="store_true", help="between the ranks of a job: start it as a run is started")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are written (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=256, help="--nodes: size of the all-reduce (%(default)s)")
    parser.add_argument("--timeout", type=int, default=120, metavar="S", help="--nodes: wait for ranks (%(default)s)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the table. Returns 1 if something essential is missing."""
    from emma_train.doctor import doctor, print_checks
    from emma_train.errors import check_range

    if not arguments.nodes:
        return doctor(arguments.folder)
    from emma_train.engine.world import join
    from emma_train.node_checks import check_nodes

    check_range("--megabytes", arguments.megabytes, 1, 65536)
    check_range("--timeout", arguments.timeout, 1, 86400)
    with join("auto", arguments.timeout) as world:
        results = check_nodes(world, arguments.folder, arguments.megabytes)
        code = print_checks(results, "These nodes can't train together yet") if world.is_main else 0
        return world.gather(code)[0]
