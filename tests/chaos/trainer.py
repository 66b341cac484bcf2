"""The command that a rank runs: `emma-train`, with a gradient whose bit flips where a file asks for it.

A file `flip-N` in the folder $EMMA_CHAOS_FLIPS flips one bit on rank N in the first pass of its next replay. With
$EMMA_SHORT_WAITS a rank that lost the others waits for seconds where it would wait for tens of seconds.
"""

import os
import sys
from pathlib import Path
from typing import Any

from emma_train.__main__ import leave_exit_code
from emma_train.cli import main
from emma_train.commands import train as train_command
from tests.chaos.agent import register

FLIPS_VARIABLE, SHORT_WAITS_VARIABLE = "EMMA_CHAOS_FLIPS", "EMMA_SHORT_WAITS"


def flip_on_request() -> None:
    """Replace what a replay calls by a version that looks for the file first."""
    from emma_train.engine.fsdp import FsdpEngine
    from tests.distributed.failing import flipped_gradient

    checksums = FsdpEngine.gradient_checksums
    path = Path(os.environ[FLIPS_VARIABLE], f"flip-{os.environ.get('RANK', 0)}")

    def flipping(self: FsdpEngine, compute_loss: Any) -> Any:
        if not path.exists():
            return checksums(self, compute_loss)
        path.unlink()
        with flipped_gradient(self):
            return checksums(self, compute_loss)

    FsdpEngine.gradient_checksums = flipping  # type: ignore[method-assign]


def train(argv: list[str]) -> int:
    """`emma-train ARGV`. Returns the exit code and leaves it to torchrun."""
    from tests.distributed.failing import shorten_waits

    train_stage = train_command._train_stage

    def prepared(*arguments: Any) -> int:
        # Not before: the time of the imports belongs to the start of the run.
        if FLIPS_VARIABLE in os.environ:
            flip_on_request()
        if SHORT_WAITS_VARIABLE in os.environ:
            shorten_waits()
        return train_stage(*arguments)

    train_command._train_stage = prepared
    code = main(argv)
    leave_exit_code(code)
    return code


if __name__ == "__main__":
    register(rank=int(os.environ["RANK"]))
    sys.exit(train(sys.argv[1:]))
