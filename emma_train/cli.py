"""emma-train: the parser, exit codes and logging. The commands are in emma_train/commands/, one file each."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from emma_train.commands import (
    ablate,
    audit,
    config,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    launch,
    plan,
    report,
    status,
    train,
)
from emma_train.errors import RankFailure, RunError, UserError, describe_shortage, empty_argument

COMMANDS = {
    "train": train,
    "plan": plan,
    "import": import_,
    "inspect": inspect,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "report": report,
    "status": status,
    "audit": audit,
    "ablate": ablate,
    "config": config,
    "doctor": doctor,
    "launch": launch,
}
TAKES_OVERRIDES = ("train", "import", "plan", "launch", "ablate")
NOISY_LOGGERS = ("httpx", "filelock", "torch", "PIL", "botocore", "aiobotocore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failed, 2 bad usage or config, 75 stopped by a signal after a
    checkpoint."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(words)
    arguments, overrides = parser.parse_known_args(words)
    if empty := empty_argument(words):
        parser.error(f"{arguments.command}: {empty} is empty; give it a value")
    takes_overrides = arguments.command in TAKES_OVERRIDES
    wrong = [word for word in overrides if not takes_overrides or word.startswith("-") or "=" not in word]
    if wrong:
        hint = "; overrides are key=value" if takes_overrides else ""
        parser.error(f"{arguments.command}: did not understand {wrong[0]!r}{hint}")
    _set_up_logging()
    try:
        run: Callable[[argparse.Namespace, list[str]], int] = arguments.run
        return run(arguments, overrides)
    except UserError as error:
        _print_error(arguments.command, error)
        return 2
    except (RunError, RankFailure) as error:
        _print_error(arguments.command, error)
        return 1
    except BrokenPipeError:
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        if (message := describe_shortage(error)) is None:
            raise
        _print_error(arguments.command, RunError(message))
        return 1


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser for a command line. Only a command that it names gets its options, because what they list may take
    long to import."""
    parser = argparse.ArgumentParser(prog="emma-train", description="Train EMMA: understand, make and edit images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        command.set_defaults(run=module.run)
        if name in words:
            module.add_arguments(command)
    return parser


def _print_error(command: str, error: Exception) -> None:
    """One line on stderr, from every rank: only one rank may have met the error. A RankFailure without a text is
    printed by the rank that failed."""
    from emma_train.config.secrets import without_secrets

    if str(error) or not isinstance(error, RankFailure):
        print(f"emma-train {command}: {without_secrets(str(error))}", file=sys.stderr, flush=True)


def _set_up_logging() -> None:
    """Log to stderr: time, rank, message."""
    from emma_train.monitor.console import PublicFormatter, log_handler, stderr_console

    rank, handler = os.environ.get("RANK", "0"), log_handler(stderr_console())
    handler.setFormatter(PublicFormatter(f"%(asctime)s [{rank}] %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logging.INFO if rank == "0" else logging.ERROR  # a message from every rank would be printed once a rank
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
