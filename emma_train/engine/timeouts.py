"""How long ranks wait for each other: long until the first step is done, and shorter from step to step."""

import faulthandler
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from emma_train.engine.world import World


class Timeouts:
    """Time-outs of the collectives of training. A rank in which a step takes longer writes its stack to stderr, so that
    a hang tells where each of the ranks was."""

    def __init__(self, world: World, groups: Sequence[dist.ProcessGroup], long_s: int, step_s: int) -> None:
        """`groups`: those of the training collectives beside the default group; their time-out is `long_s` so far."""
        self._groups = [None, world.host_group, *groups]
        self._long_s, self._step_s = long_s, step_s
        self._limit_s = long_s

    def use_step_timeout(self) -> None:
        """From now on a step may take the shorter time."""
        self._set(self._step_s)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Within, ranks may wait for the longer time: one of them may be writing for all."""
        before = self._limit_s
        self._set(self._long_s)
        yield
        self._set(before)

    def restore(self) -> None:
        """Back to the longer time, and no stacks."""
        self._set(self._long_s)
        faulthandler.cancel_dump_traceback_later()

    def _set(self, seconds: int) -> None:
        # Where stderr is no file, as under a test's capture, there is nowhere to write to.
        if _has_descriptor():
            faulthandler.dump_traceback_later(seconds, exit=False)
        if seconds != self._limit_s:
            for group in self._groups:
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
            self._limit_s = seconds


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
