"""What keeps a long run healthy: spikes of the loss are noted, and garbage is collected when all ranks do it."""

import gc
from collections import deque
from collections.abc import Sequence
from statistics import median

SPIKE_DEVIATIONS = 8.0
"""A loss so many robust standard deviations above the median is a spike."""
LEAST_HISTORY = 20
"""Losses to have seen before one is judged."""


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss stands out from those before it, by median and median absolute deviation: spikes among them move
    neither."""
    if len(before) < LEAST_HISTORY:
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(value - middle) for value in before)
    # A loss that hardly moves is allowed a hundredth of itself.
    return loss > middle + SPIKE_DEVIATIONS * max(deviation, 0.01 * abs(middle))


class SpikeWatch:
    """The last 100 logged losses."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=100)

    def note(self, loss: float) -> str | None:
        """Add a loss; says so where it is a spike."""
        said = None
        if is_spike(loss, self._before):
            usual = median(self._before)
            said = f"loss {loss:.4g} is a spike: the median of the last {len(self._before)} logged is {usual:.4g}"
        self._before.append(loss)
        return said


class GarbageCollection:
    """From here to `restore`, garbage is collected every so many steps and at no other time.

    Python would do it whenever it likes: among many ranks somebody then pauses in nearly every step, and all wait.
    """

    def __init__(self, every: int) -> None:
        """`every` 0 leaves it to Python."""
        self._every = every
        if every:
            gc.disable()
            gc.collect()
            gc.freeze()  # what is there now stays to the end, and need not be looked at again

    def after(self, step: int) -> None:
        """Collect where it is due."""
        if self._every and step % self._every == 0:
            gc.collect()

    def restore(self) -> None:
        """Leave it to Python again."""
        if self._every:
            gc.unfreeze()
            gc.enable()
