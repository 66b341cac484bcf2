"""The order of samples. Maps any position of a task's endless stream to one row of one shard's index.

ShuffledShards is a set of rows that is read once per epoch. In each epoch its shards are permuted and grouped, in that
order, into windows; the rows of each window are permuted. With n rows, position p is row p % n of epoch p // n. To find
a position, only the index of its window is read, so late positions are as fast as early ones, and a permutation of all
rows is never in memory. WeightedInterleave mixes several ShuffledShards by weight, in a fixed pattern.
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
"""Windows that ShuffledShards keeps in memory: the previous (for skipped samples), the current and the next one."""
PATTERN = 1000
"""Weights are rounded to 1/1000 of their sum."""

WindowRows = tuple[np.ndarray, int, SampleCosts, np.ndarray]
"""Some positions that lie in one window: (their indices in the query, epoch, all samples of the window, their rows)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one task in one shard."""

    folder: str
    name: str
    sha256: str
    index_sha256: str
    num_rows: int
    num_bytes: int = 0
    """Size of the tar."""
    source: int = 0
    """Index of the source, among those that are shuffled together, that selects these rows."""


LoadCosts = Callable[[Sequence[Shard], int], SampleCosts]
"""(shards, epoch) -> costs of their rows, shard after shard."""


class ShuffledShards:
    """Rows of shards that are shuffled together; each is read once per epoch."""

    def __init__(self, shards: Sequence[Shard], load: LoadCosts, seed: int, name: str, window: int) -> None:
        """`name` makes the order differ from that of other ShuffledShards with the same seed; `window` is the least
        number of rows in a window."""
        self.shards = [shard for shard in shards if shard.num_rows]
        self.num_rows = sum(shard.num_rows for shard in self.shards)
        self._load = load
        self._seed = seed
        self._name = name
        self._window = window
        self._windows: OrderedDict[tuple[int, int], Future[tuple[SampleCosts, np.ndarray]]] = OrderedDict()
        self._loaded: dict[tuple[int, int], tuple[SampleCosts, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)
        self._process = os.getpid()

    def rows(self, positions: np.ndarray) -> list[WindowRows]:
        """The rows at some positions, grouped by window, windows in order."""
        epochs, offsets = np.divmod(positions, self.num_rows)
        result = []
        for epoch in np.unique(epochs).tolist():
            starts = self._epoch(epoch)[1]
            in_epoch = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(starts, offsets[in_epoch], side="right") - 1
            for window in np.unique(windows).tolist():
                indices = in_epoch[windows == window]
                costs, order = self._get(epoch, window)
                result.append((indices, epoch, costs, order[offsets[indices] - starts[window]]))
        return result

    def window_costs(self, position: int) -> SampleCosts:
        """All samples of the window of a position, shard after shard."""
        epoch, offset = divmod(position, self.num_rows)
        return self._get(epoch, int(np.searchsorted(self._epoch(epoch)[1], offset, side="right")) - 1)[0]

    def prefetch(self, position: int) -> None:
        """Start to load the window after that of a position, in the background."""
        epoch, offset = divmod(position, self.num_rows)
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, offset, side="right"))
        self._start_loading(*((epoch, window) if window < len(starts) else (epoch + 1, 0)))

    def _epoch_order(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """The shards of each window of an epoch, and the number of rows before each window."""
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
        loaded = self._loaded.get((epoch, window))
        return self._start_loading(epoch, window).result() if loaded is None else loaded

    def _start_loading(self, epoch: int, window: int) -> "Future[tuple[SampleCosts, np.ndarray]]":
        if self._process != os.getpid():
            # After a fork: loaded windows are usable, but the thread that loads the others does not exist in this
            # process, and the lock may be held by a thread that does not exist either.
            self._process, self._lock, self._windows = os.getpid(), threading.Lock(), OrderedDict()
        with self._lock:
            key = (epoch, window)
            if (future := self._windows.get(key)) is None or (future.done() and future.exception()):
                self._windows[key] = _index_thread(self._process).submit(self._load_window, epoch, window)
                while len(self._windows) > KEPT_WINDOWS:
                    self._loaded.pop(self._windows.popitem(last=False)[0], None)
            return self._windows[key]

    def _load_window(self, epoch: int, window: int) -> tuple[SampleCosts, np.ndarray]:
        """The samples of a window, and the permutation of its rows."""
        costs = self._load([self.shards[i] for i in self._epoch(epoch)[0][window]], epoch)
        loaded = costs, _permutation(len(costs), seed_of(self._seed, epoch, f"{self._name} {window}", "rows"))
        self._loaded[epoch, window] = loaded
        return loaded


class WeightedInterleave:
    """Several pools (ShuffledShards) as one stream. In any run of positions each pool has its share by weight, to
    within one sample."""

    def __init__(self, pools: Sequence[ShuffledShards], weights: Sequence[float]) -> None:
        """`weights` has one entry per pool."""
        self.pools = list(pools)
        self._pattern = interleave_pattern(weights)
        self._counts = np.bincount(self._pattern, minlength=len(pools))
        counts_so_far = np.equal(self._pattern[None, :], np.arange(len(pools))[:, None]).cumsum(1)
        self._nth = counts_so_far[self._pattern, np.arange(len(self._pattern))] - 1

    @property
    def num_rows(self) -> int:
        """Rows of all pools."""
        return sum(pool.num_rows for pool in self.pools)

    def rows(self, positions: np.ndarray) -> list[WindowRows]:
        """The rows at some positions, grouped by pool and window. Starts to load the next window of each pool."""
        rounds, offsets = np.divmod(positions, len(self._pattern))
        pool_of = self._pattern[offsets]
        pool_positions = rounds * self._counts[pool_of] + self._nth[offsets]
        result = []
        for number, pool in enumerate(self.pools):
            in_pool = np.flatnonzero(pool_of == number)
            if len(in_pool):
                for indices, epoch, costs, rows in pool.rows(pool_positions[in_pool]):
                    result.append((in_pool[indices], epoch, costs, rows))
                pool.prefetch(int(pool_positions[in_pool].max()))
        return result

    def locate(self, position: int) -> tuple[ShuffledShards, int]:
        """The pool of a position, and the position in that pool's own stream."""
        rounds, offset = divmod(position, len(self._pattern))
        number = int(self._pattern[offset])
        return self.pools[number], rounds * int(self._counts[number]) + int(self._nth[offset])

    def epochs(self, position: int) -> float:
        """Epochs before this position of the pool that has gone through most of its own."""
        rounds, offset = divmod(position, len(self._pattern))
        taken = rounds * self._counts + np.bincount(self._pattern[:offset], minlength=len(self.pools))
        return max(float(n) / pool.num_rows for n, pool in zip(taken.tolist(), self.pools, strict=True))


def interleave_pattern(weights: Sequence[float]) -> np.ndarray:
    """The shortest cycle of pool numbers in which each pool has its share by weight, spread as evenly as possible."""
    integers = all(float(weight).is_integer() for weight in weights)
    counts = [int(weight) if integers else max(1, round(PATTERN * weight / sum(weights))) for weight in weights]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    length, debts, order = sum(counts), [0] * len(counts), []
    for _ in range(length):
        debts = [debt + count for debt, count in zip(debts, counts, strict=True)]
        due = max(range(len(counts)), key=lambda number: (debts[number], -number))
        debts[due] -= length
        order.append(due)
    return np.asarray(order, dtype=np.int64)


def _permutation(num: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).permutation(num)


@lru_cache
def _index_thread(process: int) -> ThreadPoolExecutor:
    """One loading thread per process; the argument keeps a forked process from using its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix="index")
