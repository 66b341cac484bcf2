"""The order of samples: any position of an endless stream to one row of one shard, without a permutation of them all.

A pool is the rows that make an epoch together. Epoch e permutes its shards, cuts them into windows of neighbouring
shards and permutes the rows of each window; position p stands at place p mod n of epoch p div n. So a position is found
by looking at one window, and any later one costs the same. A blend interleaves weighted pools in a fixed pattern.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np

from data_pipelines.planner.costs import SampleCosts
from emma_train.sequence.seeds import seed_of

KEPT_WINDOWS = 3
"""Of a pool, in memory: those of samples that were left behind, the current one and the one to come."""
PATTERN = 1000
"""Finest weight in a blend."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one task in one shard."""

    folder: str
    name: str
    sha256: str
    index_sha256: str
    num_rows: int
    num_bytes: int = 0
    """Of the tar."""
    source: int = 0
    """Which of the pool's sources wants these rows."""


LoadCosts = Callable[[Sequence[Shard], int], SampleCosts]
"""The rows of some shards, one after another, with the choices of an epoch."""


class ShuffledShards:
    """Rows that are drawn together, each once an epoch."""

    def __init__(self, shards: Sequence[Shard], load: LoadCosts, seed: int, name: str, window: int) -> None:
        """`name` tells pools of one seed apart; `window` is the least number of rows that are shuffled together."""
        self.shards = [shard for shard in shards if shard.num_rows]
        self.num_rows = sum(shard.num_rows for shard in self.shards)
        self._load, self._seed, self._name, self._window = load, seed, name, window
        self._windows: OrderedDict[tuple[int, int], Future[tuple[SampleCosts, np.ndarray]]] = OrderedDict()
        self._ready: dict[tuple[int, int], tuple[SampleCosts, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)
        self._process = os.getpid()

    def rows(self, positions: np.ndarray) -> list[tuple[np.ndarray, int, SampleCosts, np.ndarray]]:
        """Positions by window: (which of `positions`, epoch, columns, rows of them), in the order of the windows."""
        epochs, places = np.divmod(positions, self.num_rows)
        found = []
        for epoch in np.unique(epochs).tolist():
            starts = self._epoch(epoch)[1]
            mine = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(starts, places[mine], side="right") - 1
            for window in np.unique(windows).tolist():
                which = mine[windows == window]
                columns, order = self._get(epoch, window)
                found.append((which, epoch, columns, order[places[which] - starts[window]]))
        return found

    def prefetch(self, position: int) -> None:
        """Begin to load the window after that of a position, in the background."""
        epoch, place = divmod(position, self.num_rows)
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, place, side="right"))
        self._begin(*((epoch, window) if window < len(starts) else (epoch + 1, 0)))

    def _epoch_order(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """Shards of each window, and the place in the epoch where each window starts."""
        order = _permutation(len(self.shards), seed_of(self._seed, epoch, self._name, "shards"))
        windows: list[list[int]] = []
        starts, rows, total = [], self._window, 0
        for shard in order.tolist():
            if rows >= self._window:
                windows.append([])
                starts.append(total)
                rows = 0
            windows[-1].append(shard)
            rows += self.shards[shard].num_rows
            total += self.shards[shard].num_rows
        return windows, np.asarray(starts, dtype=np.int64)

    def _get(self, epoch: int, window: int) -> tuple[SampleCosts, np.ndarray]:
        ready = self._ready.get((epoch, window))
        return self._begin(epoch, window).result() if ready is None else ready

    def _begin(self, epoch: int, window: int) -> "Future[tuple[SampleCosts, np.ndarray]]":
        if self._process != os.getpid():
            # A forked worker has what is ready, but not the thread that would finish the rest, nor who holds the lock.
            self._process, self._lock, self._windows = os.getpid(), threading.Lock(), OrderedDict()
        with self._lock:
            key = (epoch, window)
            if (begun := self._windows.get(key)) is None or (begun.done() and begun.exception()):
                self._windows[key] = _loader(self._process).submit(self._read, epoch, window)
                while len(self._windows) > KEPT_WINDOWS:
                    self._ready.pop(self._windows.popitem(last=False)[0], None)
            return self._windows[key]

    def _read(self, epoch: int, window: int) -> tuple[SampleCosts, np.ndarray]:
        columns = self._load([self.shards[i] for i in self._epoch(epoch)[0][window]], epoch)
        ready = columns, _permutation(len(columns), seed_of(self._seed, epoch, f"{self._name} {window}", "rows"))
        self._ready[epoch, window] = ready
        return ready

    def window_of(self, position: int) -> SampleCosts:
        """All rows of a position's window, in the order of the shards."""
        epoch, place = divmod(position, self.num_rows)
        return self._get(epoch, int(np.searchsorted(self._epoch(epoch)[1], place, side="right")) - 1)[0]


class WeightedInterleave:
    """Pools interleaved by weight: of any run of positions, each pool has its share within one sample."""

    def __init__(self, pools: Sequence[ShuffledShards], weights: Sequence[float]) -> None:
        """One pool may have any weight."""
        self.pools = list(pools)
        self._pattern = pattern(weights)
        self._counts = np.bincount(self._pattern, minlength=len(pools))
        earlier = np.equal(self._pattern[None, :], np.arange(len(pools))[:, None]).cumsum(1)
        self._nth = earlier[self._pattern, np.arange(len(self._pattern))] - 1

    @property
    def num_rows(self) -> int:
        """Rows of all pools."""
        return sum(pool.num_rows for pool in self.pools)

    def rows(self, positions: np.ndarray) -> list[tuple[np.ndarray, int, SampleCosts, np.ndarray]]:
        """As Pool.rows."""
        rounds, places = np.divmod(positions, len(self._pattern))
        owner = self._pattern[places]
        own = rounds * self._counts[owner] + self._nth[places]
        found = []
        for number, pool in enumerate(self.pools):
            mine = np.flatnonzero(owner == number)
            if len(mine):
                found += [(mine[which], *rest) for which, *rest in pool.rows(own[mine])]
                pool.prefetch(int(own[mine].max()))
        return found

    def at(self, position: int) -> tuple[ShuffledShards, int]:
        """The pool of a position, and the pool's own."""
        rounds, place = divmod(position, len(self._pattern))
        owner = int(self._pattern[place])
        return self.pools[owner], rounds * int(self._counts[owner]) + int(self._nth[place])

    def epochs(self, position: int) -> float:
        """Epochs of the pool that has passed most of its own after so many positions."""
        rounds, place = divmod(position, len(self._pattern))
        taken = rounds * self._counts + np.bincount(self._pattern[:place], minlength=len(self.pools))
        return max(float(n) / pool.num_rows for n, pool in zip(taken.tolist(), self.pools, strict=True))


def pattern(weights: Sequence[float]) -> np.ndarray:
    """The shortest cycle of pool numbers with these shares (fractions to 1/1000), each spread as evenly as can be."""
    whole = all(float(weight).is_integer() for weight in weights)
    counts = [int(weight) if whole else max(1, round(PATTERN * weight / sum(weights))) for weight in weights]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    length, behind, order = sum(counts), [0] * len(counts), []
    for _ in range(length):
        behind = [debt + count for debt, count in zip(behind, counts, strict=True)]
        due = max(range(len(counts)), key=lambda number: (behind[number], -number))
        behind[due] -= length
        order.append(due)
    return np.asarray(order, dtype=np.int64)


def _permutation(num: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).permutation(num)


@lru_cache
def _loader(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="index")
