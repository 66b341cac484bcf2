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
from emma_train.config.schema import SourceConfig
from emma_train.sequence.seeds import seed_of
from emma_train.storage.urls import join_url

KEPT_WINDOWS = 3
"""Windows that ShuffledShards keeps in memory: the previous (for skipped samples), the current and the next one."""
PATTERN = 1000
"""Weights are rounded to 1/1000 of their sum."""
LONG_PATTERN = 100_000
"""Shares of pools that have a common weight are rounded to 1/100,000 of their sum."""

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
    source: SourceConfig | None = None
    """The source whose tags select these rows; None selects all."""
    tar: str = ""
    """Path or URL of the tar of a selection's shard; empty if it is the file of this name in the folder."""

    @property
    def url(self) -> str:
        """Path or URL of the tar."""
        return self.tar or join_url(self.folder, self.name)

    @property
    def content(self) -> str:
        """Hash of what the shard holds: of a selection, of the list of its rows."""
        return self.index_sha256 if self.tar else self.sha256


LoadCosts = Callable[[Sequence[Shard], int], SampleCosts]
"""(shards, epoch) -> costs of their rows, shard after shard."""


class ShuffledShards:
    """Rows of shards that are shuffled together; each is read once per epoch."""

    def __init__(
        self,
        shards: Sequence[Shard],
        load: LoadCosts,
        seed: int,
        name: str,
        window: int,
        kept: Sequence[bool] | None = None,
    ) -> None:
        """`name` makes the order differ from that of other ShuffledShards with the same seed; `window` is the least
        number of rows in a window. `kept` says which shards are read; the order skips the rows of the others."""
        kept = [True] * len(shards) if kept is None else kept
        self.shards = [shard for shard in shards if shard.num_rows]
        self._kept = [is_kept for shard, is_kept in zip(shards, kept, strict=True) if shard.num_rows]
        self._num_kept = [shard.num_rows * is_kept for shard, is_kept in zip(self.shards, self._kept, strict=True)]
        self.num_rows = sum(self._num_kept)
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

    def num_before(self, position: int, narrower: "ShuffledShards") -> int:
        """Number of rows of `narrower`, which keeps fewer shards of the same order, before a position of this one."""
        epoch, offset = divmod(position, self.num_rows)
        windows, starts = self._epoch(epoch)
        index = int(np.searchsorted(starts, offset, side="right")) - 1
        before = sum(narrower._num_kept[shard] for _, shards in windows[:index] for shard in shards)
        number, shards = windows[index]
        sizes = [self.shards[shard].num_rows for shard in shards]
        order = self._permuted_rows(epoch, number, shards)
        kept, narrowed = (
            np.repeat([has[shard] for shard in shards], sizes)[order] for has in (self._kept, narrower._kept)
        )
        return epoch * narrower.num_rows + before + int(narrowed[kept][: offset - starts[index]].sum())

    def prefetch(self, position: int) -> None:
        """Start to load the window after that of a position, in the background."""
        epoch, offset = divmod(position, self.num_rows)
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, offset, side="right"))
        self._start_loading(*((epoch, window) if window < len(starts) else (epoch + 1, 0)))

    def _epoch_order(self, epoch: int) -> tuple[list[tuple[int, list[int]]], np.ndarray]:
        """Number and shards of each window of an epoch that has kept rows, and the number of kept rows before each."""
        order = _permutation(len(self.shards), seed_of(self._seed, epoch, self._name, "shards"))
        windows: list[list[int]] = []
        rows = self._window
        for shard in order.tolist():
            if rows >= self._window:
                windows.append([])
                rows = 0
            windows[-1].append(shard)
            rows += self.shards[shard].num_rows
        sizes = [sum(self._num_kept[shard] for shard in shards) for shards in windows]
        starts = np.cumsum(sizes) - sizes
        return [entry for entry, size in zip(enumerate(windows), sizes, strict=True) if size], starts[
            np.asarray(sizes) > 0
        ]

    def _permuted_rows(self, epoch: int, number: int, shards: Sequence[int]) -> np.ndarray:
        """The permutation of all rows of a window, those of shards that are not kept included."""
        num_rows = sum(self.shards[shard].num_rows for shard in shards)
        return _permutation(num_rows, seed_of(self._seed, epoch, f"{self._name} {number}", "rows"))

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
        number, shards = self._epoch(epoch)[0][window]
        costs = self._load([self.shards[shard] for shard in shards if self._kept[shard]], epoch)
        order = self._permuted_rows(epoch, number, shards)
        is_kept = np.repeat([self._kept[shard] for shard in shards], [self.shards[shard].num_rows for shard in shards])
        loaded = costs, (np.cumsum(is_kept) - 1)[order[is_kept[order]]]
        self._loaded[epoch, window] = loaded
        return loaded


class WeightedInterleave:
    """Several pools (ShuffledShards) as one stream. In any run of positions each pool has its share by weight, to
    within one sample.

    A position of the stream is one of a pool: the pattern says of which, and how many of that pool precede. `offsets`
    has a number per pool to add to the latter, for pools that were read before they came together; None adds nothing.
    """

    def __init__(self, pools: Sequence[ShuffledShards], pattern: np.ndarray) -> None:
        """`pattern` is a cycle of pool numbers."""
        self.pools = list(pools)
        self._pattern = pattern
        self._counts = np.bincount(self._pattern, minlength=len(pools))
        counts_so_far = np.equal(self._pattern[None, :], np.arange(len(pools))[:, None]).cumsum(1)
        self._nth = counts_so_far[self._pattern, np.arange(len(self._pattern))] - 1

    @property
    def num_rows(self) -> int:
        """Rows of all pools."""
        return sum(pool.num_rows for pool in self.pools)

    def rows(self, positions: np.ndarray, offsets: Sequence[int] | None = None) -> list[WindowRows]:
        """The rows at some positions, grouped by pool and window. Starts to load the next window of each pool."""
        rounds, in_pattern = np.divmod(positions, len(self._pattern))
        pool_of = self._pattern[in_pattern]
        pool_positions = rounds * self._counts[pool_of] + self._nth[in_pattern]
        if offsets is not None:
            pool_positions = pool_positions + np.asarray(offsets, dtype=np.int64)[pool_of]
        result = []
        for number, pool in enumerate(self.pools):
            in_pool = np.flatnonzero(pool_of == number)
            if len(in_pool):
                for indices, epoch, costs, rows in pool.rows(pool_positions[in_pool]):
                    result.append((in_pool[indices], epoch, costs, rows))
                pool.prefetch(int(pool_positions[in_pool].max()))
        return result

    def locate(self, position: int, offsets: Sequence[int] | None = None) -> tuple[int, int]:
        """The number of the pool of a position, and the position in that pool."""
        rounds, index = divmod(position, len(self._pattern))
        number = int(self._pattern[index])
        offset = offsets[number] if offsets is not None else 0
        return number, rounds * int(self._counts[number]) + int(self._nth[index]) + offset

    def position_of(self, number: int, position: int, offsets: Sequence[int]) -> int:
        """The inverse of `locate`."""
        rounds, nth = divmod(position - offsets[number], int(self._counts[number]))
        return rounds * len(self._pattern) + int(np.flatnonzero(self._pattern == number)[nth])

    def counts_before(self, position: int) -> list[int]:
        """How many positions of each pool precede a position of the stream, without offsets."""
        rounds, index = divmod(position, len(self._pattern))
        counts = rounds * self._counts + np.bincount(self._pattern[:index], minlength=len(self.pools))
        return [int(count) for count in counts.tolist()]

    def epochs(self, position: int, offsets: Sequence[int] | None = None) -> float:
        """Epochs before this position of the pool that has gone through most of its own."""
        counts = self.counts_before(position)
        taken = [count + offset for count, offset in zip(counts, offsets or [0] * len(counts), strict=True)]
        return max(float(n) / pool.num_rows for n, pool in zip(taken, self.pools, strict=True))


def even_pattern(shares: Sequence[float], length: int = LONG_PATTERN) -> np.ndarray:
    """A cycle of about `length` pool numbers in which each pool has its share, spread evenly."""
    counts = [max(1, round(length * share / sum(shares))) for share in shares]
    fractions = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(fractions, kind="stable")]


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
