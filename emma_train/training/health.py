"""Watching a long run: loss spikes are logged, and all ranks collect garbage at the same steps."""

import gc
from collections import deque
from collections.abc import Sequence
from statistics import median

SPIKE_DEVIATIONS = 8.0
"""Robust standard deviations above the median from which a loss is a spike."""
MIN_HISTORY = 20
"""Number of losses from which on spikes are detected."""


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss is far above the earlier ones. Uses median and median absolute deviation, which earlier spikes
    hardly change."""
    if len(before) < MIN_HISTORY:
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(value - middle) for value in before)
    # For a nearly constant loss, use 1 % of the median as the deviation.
    return loss > middle + SPIKE_DEVIATIONS * max(deviation, 0.01 * abs(middle))


class SpikeWatch:
    """Compares every logged loss with the last 100."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=100)

    def note(self, loss: float) -> str | None:
        """Add a loss. Returns a message if it is a spike."""
        message = None
        if is_spike(loss, self._before):
            usual = median(self._before)
            message = f"loss {loss:.4g} is a spike: the median of the last {len(self._before)} logged is {usual:.4g}"
        self._before.append(loss)
        return message


class GarbageCollection:
    """Until `restore`, garbage is collected every `every` steps and at no other time.

    Python's automatic collection pauses each rank at another time: among many ranks, one pauses in nearly every step
    and all others wait for it.
    """

    def __init__(self, every: int) -> None:
        """0 keeps Python's automatic collection."""
        self._every = every
        if every:
            gc.disable()
            gc.collect()
            gc.freeze()  # existing objects live to the end of the run: never scan them again

    def after(self, step: int) -> None:
        """Collect garbage if it is due after `step`."""
        if self._every and step % self._every == 0:
            gc.collect()

    def restore(self) -> None:
        """Turn Python's automatic collection on again."""
        if self._every:
            gc.unfreeze()
            gc.enable()
