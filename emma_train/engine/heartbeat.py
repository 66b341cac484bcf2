"""Heartbeats of all ranks: a rank that no longer runs is named, though the others wait in a call that never returns.

rank_failure.py needs an exception. gloo raises one where a peer is gone; a host that waits for the device behind a
collective of NCCL gets none, until NCCL's own watchdog aborts the process after the whole time-out and names nobody.
So two threads of each rank work beside training: one counts up in the store of the process group and reads the counts
of the other ranks, the other ends the process.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import torch.distributed as dist

from emma_train.engine.rank_failure import list_ranks, store_gone, store_key
from emma_train.engine.torch_private import default_store
from emma_train.engine.world import World

log = logging.getLogger(__name__)
BEAT_S = 5.0
"""Seconds between two counts."""
SILENT_S = 60.0
"""A rank whose count stands still for this long is dead or stopped. Longer than any call that keeps Python's lock."""
GRACE_S = 30.0
"""Time to end by itself for a rank whose main thread notices the loss too; more than rank_failure.STORE_S."""
_ENDED = b"ended"


class Heartbeat:
    """A context; within it, this rank's process ends with exit code 1 when another rank has died, stopped or failed.

    All ranks enter it in the same order. A rank may leave it before the others do. own_hang: where this rank hangs, if
    it does (StallWatch.own_hang): the others end before it and take the store along, of which it would know no more.
    """

    _num_entered = 0

    def __init__(
        self,
        world: World,
        own_hang: Callable[[], str] = str,
        silent_s: float = SILENT_S,
        beat_s: float = BEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self._rank, self._size = world.rank, world.size
        self._own_hang = own_hang
        self._silent_s, self._beat_s, self._grace_s = silent_s, beat_s, grace_s
        self._left = threading.Event()
        self._failure: str | None = None
        self._is_reporter = True
        self._last_answer = time.monotonic()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Heartbeat":
        Heartbeat._num_entered += 1
        if self._size > 1:
            # A clone, because a store may be used by one thread alone.
            store = default_store().clone()  # type: ignore[attr-defined]
            keys = [store_key(f"beat/{Heartbeat._num_entered}/{rank}") for rank in range(self._size)]
            self._start(lambda: self._beat(store, keys), self._end_after_failure)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join(timeout=1)  # longer only where the store hangs

    def _start(self, *functions: Callable[[], None]) -> None:
        self._last_answer = time.monotonic()
        self._threads = [threading.Thread(target=function, name="heartbeat", daemon=True) for function in functions]
        for thread in self._threads:
            thread.start()

    def _beat(self, store: dist.Store, keys: list[str]) -> None:
        """Count up and watch the others, until this rank leaves or a failure is known."""
        count, watched = 0, BeatCounts(self._silent_s, 2 * self._beat_s)
        try:
            while not self._left.is_set() and self._failure is None:
                store.set(keys[self._rank], str(count := count + 1))
                failure = self._look(store, keys, watched)
                self._last_answer = time.monotonic()
                if failure is not None:
                    self._is_reporter = store.add(store_key("reporters"), 1) == 1
                    self._failure = failure
                self._left.wait(self._beat_s)
            store.set(keys[self._rank], _ENDED.decode())
        except dist.DistError:
            self._failure = self._describe_loss()

    def _describe_loss(self) -> str:
        """A line for a store that is gone."""
        if line := self._own_hang():
            return f"rank {self._rank} of {self._size} hangs: {line}"
        return store_gone(self._rank, self._size)

    def _look(self, store: dist.Store, keys: list[str], watched: "BeatCounts") -> str | None:
        """What the others are known to have come to; None where all are well."""
        if store.check([store_key("failed")]):
            return store.get(store_key("failed")).decode()
        if store.check(keys):  # else some rank has not entered yet
            watched.update(dict(enumerate(store.multi_get(keys))), time.monotonic())
        if not (silent := watched.silent(time.monotonic())):
            return None
        failure = (
            f"{list_ranks(silent)} of {self._size} died or {'hang' if silent[1:] else 'hangs'}: "
            f"no sign of life in {self._silent_s:g} s"
        )
        store.set(store_key("failed"), failure)
        return failure

    def _end_after_failure(self) -> None:
        """End the process some time after a failure is known; without the other thread's help, which may hang in the
        store when the machine that keeps it is gone."""
        while not self._left.wait(self._beat_s / 2):
            if self._failure is None and time.monotonic() - self._last_answer > self._silent_s:
                self._failure = self._describe_loss()
            if self._failure is not None:
                break
        if self._failure is None or self._left.wait(self._grace_s):
            return
        if self._is_reporter:
            log.error("%s", self._failure)
        logging.shutdown()
        os._exit(1)


class BeatCounts:
    """The counts of all ranks and when each was last seen to change."""

    def __init__(self, silent_s: float, tolerance_s: float) -> None:
        """Where one rank is silent for `silent_s`, so are those that have not changed for `tolerance_s` less: when a
        machine goes down, its ranks do not stop at the same beat."""
        self._silent_s, self._tolerance_s = silent_s, tolerance_s
        self._seen: dict[int, tuple[bytes, float]] = {}

    def update(self, counts: Mapping[int, bytes], now: float) -> None:
        """Take the counts of this moment, by rank."""
        for rank, count in counts.items():
            if rank not in self._seen or self._seen[rank][0] != count:
                self._seen[rank] = (count, now)

    def silent(self, now: float) -> list[int]:
        """Ranks that have not left and whose count stands still."""
        ages = {rank: now - changed for rank, (count, changed) in self._seen.items() if count != _ENDED}
        if max(ages.values(), default=0.0) <= self._silent_s:
            return []
        return sorted(rank for rank, age in ages.items() if age > self._silent_s - self._tolerance_s)
