"""Metrics that any code may record while a step runs: `record_metric(name, value, reduce)` (docs/metrics.md).

Values stay on their device until the step is logged. training/step_metrics.py then reduces all names over the ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Reduce = Literal["sum", "mean", "max", "min"]


@dataclass
class RecordedMetric:
    """What one rank has recorded under one name in one step."""

    reduce: Reduce
    value: Tensor
    """0-dim: the sum of the values so far (sum and mean), or their maximum or minimum."""
    num_values: int


Recorded = dict[str, RecordedMetric]
"""By metric name."""
_recorded: Recorded | None = None
"""Of the step that runs now; None where nothing is recorded."""


def is_recording() -> bool:
    """Whether `record_metric` does anything now: to compute nothing for it where it does not."""
    return _recorded is not None


def record_metric(name: str, value: Tensor | float, reduce: Reduce) -> None:
    """Add a value to a metric of the step that runs now. Never waits for the device.

    `value` is a number or a tensor of any shape, whose elements count as so many values. They are reduced over all
    calls of the step and over all packs of all ranks. Ranks may record different names.

    Does nothing where the step is not logged, outside of training, in layers that torch.compile has compiled, and when
    activation checkpointing runs a layer for the second time. Raises ValueError where `reduce` is unknown or differs
    from an earlier call.
    """
    if _recorded is None or torch.compiler.is_compiling():
        return
    if reduce not in get_args(Reduce):
        raise ValueError(f"metric {name}: reduce is {reduce!r}; use one of {', '.join(get_args(Reduce))}")
    values = _wide_enough(value.detach()) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if not values.numel() and reduce in ("max", "min"):
        return
    part = {"max": values.amax, "min": values.amin}.get(reduce, values.sum)()
    before = _recorded.get(name)
    if before is None:
        _recorded[name] = RecordedMetric(reduce, part, values.numel())
        return
    if before.reduce != reduce:
        raise ValueError(f"metric {name} is recorded with reduce={before.reduce!r} and with reduce={reduce!r}")
    join = {"max": torch.maximum, "min": torch.minimum}.get(reduce, torch.add)
    before.value = join(before.value, part)
    before.num_values += values.numel()


@contextmanager
def recording(enabled: bool = True) -> Iterator[Recorded]:
    """Collect what is recorded inside this block; where not `enabled`, recording does nothing there."""
    recorded: Recorded = {}
    with _recording_into(recorded if enabled else None):
        yield recorded


@contextmanager
def not_recording() -> Iterator[None]:
    """Ignore what is recorded inside this block: the same values have been recorded before."""
    with _recording_into(None):
        yield


@contextmanager
def _recording_into(recorded: Recorded | None) -> Iterator[None]:
    # A module variable and not a ContextVar: on CUDA, backward runs Python code in threads of its own.
    global _recorded
    before, _recorded = _recorded, recorded
    try:
        yield
    finally:
        _recorded = before


def _wide_enough(values: Tensor) -> Tensor:
    """Sums of bool and of 16-bit numbers need a wider type."""
    if not values.is_floating_point():
        return values.long()
    return values.float() if values.element_size() < 4 else values
