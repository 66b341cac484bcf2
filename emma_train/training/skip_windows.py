"""Windows of steps that a run does not train: those of health.skip_steps, and those of rewinds after a spike.

Step numbers stay as they are: the data and the noise of a skipped step are never seen, and its successor has the same
ones as without it.
"""

from collections.abc import Iterable, Sequence

Windows = list[list[int]]
"""[first, last] of each, in order, without overlaps."""


def merged(windows: Iterable[Sequence[int]]) -> Windows:
    """The windows in order; those that overlap or touch each other are one."""
    result: Windows = []
    for first, last in sorted(list(window) for window in windows):
        if result and first <= result[-1][1] + 1:
            result[-1][1] = max(last, result[-1][1])
        else:
            result.append([first, last])
    return result


def after(step: int, windows: Iterable[Sequence[int]]) -> Windows:
    """What of the windows comes after a step: the steps before it have been trained."""
    return [[max(first, step + 1), last] for first, last in windows if last > step]


def is_inside(step: int, windows: Iterable[Sequence[int]]) -> bool:
    """Whether a step is in one of the windows."""
    return any(first <= step <= last for first, last in windows)
