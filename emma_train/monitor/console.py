"""The terminal of a command: log lines and the progress bar share one console, so that neither overwrites the other."""

import logging
from functools import cache

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from emma_train.config.secrets import without_secrets


@cache
def stderr_console() -> Console:
    """The console of this process, on stderr."""
    return Console(stderr=True)


class PublicFormatter(logging.Formatter):
    """Formats log lines, and removes passwords and access tokens from the URLs in them."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def log_handler(console: Console) -> logging.Handler:
    """A handler that prints log lines above a live progress bar; plain lines where the console is not a terminal."""
    if not console.is_terminal:
        return logging.StreamHandler()
    return RichHandler(
        console=console,
        show_time=False,
        show_level=False,
        show_path=False,
        highlighter=NullHighlighter(),
        keywords=[],
    )
