"""The loss account: every loss is a sum over its own tokens divided by their count over the whole optimizer step.

The whole step means all ranks and all micro-batches, so ranks, accumulation and packing do not change the gradient
(practice pain point 3). Counts are known before the first forward; sums stay on the device until a line is logged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emma_train.config.schema import LossConfig
from emma_train.sequence.pack import PackedBatch

TERMS = ("i2t", "t2i", "it2i")
"""Metric names; i2t counts supervised text tokens (images in router tuning), t2i and it2i target tokens."""


@dataclass(frozen=True)
class Counts:
    """Tokens of each loss over the optimizer step."""

    i2t: int = 0
    t2i: int = 0
    it2i: int = 0

    @property
    def flow(self) -> int:
        """Flow matching is one loss over both of its tasks."""
        return self.t2i + self.it2i


def count(batches: Sequence[PackedBatch], loss: str) -> Counts:
    """This rank's counts; `loss` is the stage's (tokens or router)."""
    i2t = sum(int((b.stem >= 0).sum()) if loss == "router" else len(b.labels) for b in batches)
    targets = [b.num_target_tokens for b in batches]
    return Counts(i2t, sum(t.get("t2i", 0) for t in targets), sum(t.get("it2i", 0) for t in targets))


class LossAccumulator:
    """Turns per-token losses of one micro-batch into its share of the step's loss, and keeps the sums for the log."""

    def __init__(self, config: LossConfig, counts: Counts, device: torch.device) -> None:
        self.config, self.counts = config, counts
        self.sums = torch.zeros(len(TERMS), device=device)
        """Sums over tokens of i2t, t2i and it2i on this rank, unweighted."""

    def add(self, i2t: Tensor, flow: Tensor, flow_is_edit: Tensor) -> Tensor:
        """i2t: [L] losses; flow: [target tokens] losses; flow_is_edit: bool [target tokens] -> scalar to
        differentiate."""
        zero = torch.zeros((), device=flow.device)
        with torch.no_grad():
            edit = torch.where(flow_is_edit, flow, zero).sum()
            self.sums += torch.stack([i2t.sum(), flow.sum() - edit, edit])
        # A loss without tokens adds an exact zero but stays in the graph: every rank differentiates the same modules.
        i2t_share = self.config.ce_weight / max(self.counts.i2t, 1)
        flow_share = self.config.fm_weight / max(self.counts.flow, 1)
        return i2t.sum() * i2t_share + flow.sum() * flow_share


def losses(sums: Sequence[float], counts: Counts, config: LossConfig) -> dict[str, float]:
    """Logged values from sums over all ranks: `loss` and, where the task is present, `loss/i2t|t2i|it2i`."""
    named: Mapping[str, int] = {"i2t": counts.i2t, "t2i": counts.t2i, "it2i": counts.it2i}
    values = {f"loss/{t}": s / named[t] for t, s in zip(TERMS, sums, strict=True) if named[t]}
    total = config.ce_weight * sums[0] / counts.i2t if counts.i2t else 0.0
    total += config.fm_weight * (sums[1] + sums[2]) / counts.flow if counts.flow else 0.0
    return {"loss": total, **values}
