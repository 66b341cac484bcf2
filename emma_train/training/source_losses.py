"""Losses by source, where a task has more than one: recorded as sums over tokens, logged as their means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emma_train.metrics import is_recording, record_metric

SUM, NUM_TOKENS = "source_loss_sum/", "source_num_tokens/"
"""Recorded under these prefixes, a task and a source."""


def record_source_losses(tasks: Sequence[str], sources: Sequence[str], owner: Tensor, losses: Tensor) -> None:
    """Record the losses of one micro-batch by source; never waits for the device.

    tasks, sources: of each sample, or of each target; an empty source counts nowhere. owner: int64 [N], index in them
    of each loss. losses: [N].
    """
    if not is_recording() or not any(sources):
        return
    pairs = list(zip(tasks, sources, strict=True))
    keys = list(dict.fromkeys(pairs))
    key_of_pair = torch.tensor([keys.index(pair) for pair in pairs], dtype=torch.int64)
    indices = key_of_pair.to(losses.device, non_blocking=True)[owner]
    values = losses.detach().double()
    sums, counts = (values.new_zeros(len(keys)).index_add_(0, indices, v) for v in (values, torch.ones_like(values)))
    for index, (task, source) in enumerate(keys):
        if source:
            record_metric(f"{SUM}{task}/{source}", sums[index], "sum")
            record_metric(f"{NUM_TOKENS}{task}/{source}", counts[index], "sum")


def pop_source_losses(reduced: dict[str, float]) -> dict[str, float]:
    """`loss/TASK/SOURCE` of the sources that had tokens, from what was recorded over all ranks, which is removed."""
    names = [name.removeprefix(SUM) for name in reduced if name.startswith(SUM)]
    sums = {name: (reduced.pop(f"{SUM}{name}"), reduced.pop(f"{NUM_TOKENS}{name}")) for name in names}
    return {f"loss/{name}": total / num_tokens for name, (total, num_tokens) in sums.items() if num_tokens}
