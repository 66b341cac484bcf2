"""How far a step has read the stream of a task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True)
class TaskCursor:
    """Cursor of one task's stream: the next unread position, and earlier positions that were skipped and come first."""

    next: int = 0
    """First position after all taken ones."""
    skipped: tuple[int, ...] = ()
    """Positions below `next` that are not taken yet, in order."""
    tokens: int = 0
    """LLM tokens of all samples taken so far; used if the mix is by tokens."""

    offsets: tuple[int, ...] = ()
    """For each pool, its position minus its share of the stream's position; empty where these agree. It stays the same
    throughout a phase."""

    def positions(self, num: int) -> np.ndarray:
        """The next `num` positions: skipped ones first. int64 [num]."""
        skipped = np.asarray(self.skipped[:num], dtype=np.int64)
        fresh = np.arange(self.next, self.next + num - len(skipped), dtype=np.int64)
        return np.concatenate([skipped, fresh])

    def after(self, positions: np.ndarray, taken: Sequence[int], tokens: int) -> "TaskCursor":
        """The cursor after a step whose candidates were at `positions` and that took those with indices `taken`.

        `tokens` is the new total.
        """
        if not taken:
            return replace(self, tokens=tokens)
        last = max(taken)
        last_position = int(positions[last])
        indices = set(taken)
        skipped = [index for index in range(last + 1) if index not in indices]
        still_skipped = [position for position in self.skipped if position > last_position]
        left = (*positions[skipped].tolist(), *still_skipped)
        return replace(self, next=max(self.next, last_position + 1), skipped=left, tokens=tokens)

    def advanced(self, num: int) -> "TaskCursor":
        """The cursor after the next `num` positions were taken."""
        num_skipped = min(num, len(self.skipped))
        return replace(self, next=self.next + num - num_skipped, skipped=self.skipped[num_skipped:])
