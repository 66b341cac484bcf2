"""Recorded metrics (emma_train/metrics.py) over all ranks, once for every logged step."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from emma_train.engine.world import World
from emma_train.metrics import Recorded, Reduce

Usage = TypeVar("Usage")


class HostMetric(NamedTuple):
    """A recorded metric of one rank, as plain numbers."""

    reduce: Reduce
    value: float
    num_values: int


def reduce_metrics(
    recorded: Recorded, world: World, usage: Callable[[], Usage]
) -> tuple[dict[str, float], list[Usage]]:
    """Every recorded metric over all ranks, by name, and `usage()` of every rank; every rank calls it.

    Waits for the device before it calls `usage`. All travels in one gather, metrics together with their names: a rank
    may lack a metric that another one has.
    Raises ValueError, on every rank, where ranks recorded one name with different reductions.
    """
    host = to_host(recorded)
    gathered = world.gather((host, usage()))
    ranks = [metrics for metrics, _ in gathered]
    names = dict.fromkeys(name for metrics in ranks for name in metrics)
    reduced = {name: over_ranks(name, [m[name] for m in ranks if name in m], world.sp_size) for name in names}
    return {name: value for name, value in reduced.items() if value is not None}, [used for _, used in gathered]


def to_host(recorded: Recorded) -> dict[str, HostMetric]:
    """The same metrics as plain numbers, with one copy from each device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, metric in recorded.items():
        by_device.setdefault(metric.value.device, {})[name] = metric.value.double()
    values: dict[str, float] = {}
    for tensors in by_device.values():
        values |= dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
    return {name: HostMetric(m.reduce, values[name], m.num_values) for name, m in recorded.items()}


def over_ranks(name: str, metrics: list[HostMetric], sp_size: int) -> float | None:
    """One metric from what each rank recorded; None for the mean of no values."""
    reductions = sorted({metric.reduce for metric in metrics})
    if len(reductions) > 1:
        raise ValueError(f"metric {name} is recorded with reduce={' and reduce='.join(reductions)} on different ranks")
    values = torch.tensor([metric.value for metric in metrics], dtype=torch.float64)
    num_values = sum(metric.num_values for metric in metrics)
    match reductions[0]:
        case "sum":
            return float(values.sum()) / sp_size  # ranks that share a pack have all recorded the same
        case "mean":
            return float(values.sum()) / num_values if num_values else None
        case "max":
            return float(values.max())
        case "min":
            return float(values.min())
