"""emma-data: the parser, exit codes and logging. The commands are in data_pipelines/commands/, one file each."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from data_pipelines.commands import (
    annotate,
    cache_latents,
    card,
    check,
    import_,
    index,
    materialize,
    run,
    select,
    stats,
    synthesize,
)
from emma_train.config.secrets import without_secrets
from emma_train.errors import RunError, UserError, describe_shortage, empty_argument

DATA_COMMANDS = {
    "import": import_,
    "index": index,
    "check": check,
    "stats": stats,
    "annotate": annotate,
    "select": select,
    "synthesize": synthesize,
    "materialize": materialize,
    "card": card,
    "run": run,
    "cache-latents": cache_latents,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check, a job or storage failed, 2 bad usage or input."""
    words, parser = sys.argv[1:] if argv is None else list(argv), build_parser()
    arguments = parser.parse_args(words)
    if empty := empty_argument(words):
        parser.error(f"{empty} is empty; give it a value")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.run
        return command(arguments)
    except (UserError, RunError) as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2 if isinstance(error, UserError) else 1
    except (OSError, MemoryError, RuntimeError) as error:
        if (shortage := describe_shortage(error)) is None:
            raise
        sys.stderr.write(f"error: {without_secrets(shortage)}\n")
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emma-data", description="Make data sets, check and select them.")
    parser.set_defaults(build_parser=build_parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in DATA_COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser
