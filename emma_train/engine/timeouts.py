"""How long ranks wait for each other: long until the first step is done, shorter in every later step."""

import faulthandler
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from emma_train.engine.stall_watch import StallWatch
from emma_train.engine.torch_private import set_group_timeout
from emma_train.engine.world import World


class Timeouts:
    """Timeouts of the collectives of training. A rank whose step takes longer writes its stack to stderr, which needs
    no Python; shortly before that, `watch` reports where all ranks are."""

    def __init__(
        self, world: World, groups: Sequence[dist.ProcessGroup], long_s: int, step_s: int, watch: StallWatch
    ) -> None:
        """`groups`: process groups of the engine, without the default group; their timeout is `long_s` at first."""
        self._watch = watch
        self._groups = [None, world.host_group, *groups]
        self._long_s = long_s
        self._step_s = step_s
        self._current_s = long_s
        watch.expect(long_s)

    def use_step_timeout(self, done: int) -> None:
        """Use the step timeout from here on; `done`: the step that has ended."""
        self._watch.done = done
        self._set(self._step_s)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Use the long timeout inside this block, where one rank may write files while the others wait."""
        before = self._current_s
        self._set(self._long_s)
        yield
        self._set(before)

    def restore(self) -> None:
        """Use the long timeout again, and write no more stacks."""
        self._set(self._long_s)
        self._watch.rest()
        faulthandler.cancel_dump_traceback_later()

    def _set(self, seconds: int) -> None:
        self._watch.expect(seconds)
        if _stderr_is_file():
            faulthandler.dump_traceback_later(seconds, exit=False)
        if seconds != self._current_s:
            for group in self._groups:
                set_group_timeout(group, seconds)
            self._current_s = seconds


def _stderr_is_file() -> bool:
    """faulthandler needs a file descriptor; a test that captures stderr may have none."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
