"""The process group of saves: what ranks agree on while a save runs beside training."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from emma_train.engine.world import World

_T = TypeVar("_T")


class SaveGroup:
    """A gloo group of all ranks with a timeout. A failure on one rank is raised on every rank."""

    def __init__(self, world: World, timeout_s: float) -> None:
        self.world = world
        self.num_failures = -1
        """Failed saves; part of the key under which plans are cached."""
        self._timeout_s = timeout_s
        self.renew()

    def renew(self) -> None:
        """After a failure, drop what ranks may no longer have in common: the process group, which is unusable after a
        timeout, and the cached plans, which some ranks may lack."""
        # Collectives of a save run at the same time as those of training, so they need another group.
        self.process_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        self.num_failures += 1

    def on_main(self, function: Callable[[], Any]) -> None:
        """Call `function` on the main rank. Its failure is raised on every rank."""
        self.on_all(lambda: function() and None if self.world.is_main else None)

    def on_all(self, function: Callable[[], _T]) -> list[_T]:
        """Results of `function` on every rank. A failure on one is raised on every rank."""
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = f"rank {self.world.rank} on {socket.gethostname()}: {one_line(caught)}"
        results: list[Any] = [None] * self.world.size
        dist.all_gather_object(results, (value, error), group=self.process_group)
        if errors := [error for _, error in results if error is not None]:
            raise OSError(errors[0])
        return [value for value, _ in results]


def one_line(error: BaseException) -> str:
    """An error in one line for a person."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {one_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
