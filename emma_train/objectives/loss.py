"""The loss of one optimizer step: every loss is a sum over its own tokens divided by their count over the step.

The step means all ranks and all micro-batches, so the number of ranks, accumulation and packing do not change the
gradient. Counts are known before the first forward; sums stay on the device until a line is logged.

    loss = ce_weight * (sum over tokens of tasks that make text) / (their number)
         + fm_weight * (sum over target tokens of tasks that make an image) / (their number)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emma_train.config.schema import LossConfig
from emma_train.sequence.pack import PackedBatch
from emma_train.sequence.tasks import TASKS, tasks_of_loss

TEXT_TASKS, FLOW_TASKS = tasks_of_loss("text"), tasks_of_loss("flow")


@dataclass(frozen=True)
class Counts:
    """Tokens of each loss over the optimizer step: supervised text tokens (in router tuning labelled images), or
    target tokens."""

    by_task: Mapping[str, int] = field(default_factory=dict)

    def of(self, tasks: Sequence[str]) -> int:
        """Tokens of some tasks together."""
        return sum(self.by_task.get(task, 0) for task in tasks)

    def terms(self, config: LossConfig) -> tuple[tuple[tuple[str, ...], float, int], ...]:
        """The terms of the loss: (tasks, weight, tokens)."""
        return (
            (TEXT_TASKS, config.ce_weight, self.of(TEXT_TASKS)),
            (FLOW_TASKS, config.fm_weight, self.of(FLOW_TASKS)),
        )


def count(batches: Sequence[PackedBatch], loss: str) -> Counts:
    """This rank's counts; `loss` is the stage's (tokens or router)."""
    by_task = dict.fromkeys(TASKS, 0)
    for batch in batches:
        if loss == "router":
            by_task[TEXT_TASKS[0]] += int((batch.stem >= 0).sum())
            continue
        for numbers in (batch.num_supervised, batch.num_target_tokens):
            for task, number in numbers.items():
                by_task[task] += number
    return Counts(by_task)


class LossAccumulator:
    """Turns per-token losses of one micro-batch into its share of the step's loss, and keeps the sums for the log."""

    def __init__(self, config: LossConfig, counts: Counts, device: torch.device) -> None:
        self.config, self.counts = config, counts
        self.sums = torch.zeros(len(TASKS), device=device)
        """Sum over tokens of each task of TASKS on this rank, unweighted."""

    def add(self, text: Tensor, text_task: Tensor, flow: Tensor, flow_task: Tensor) -> Tensor:
        """Add one micro-batch and return its share of the step's loss, a scalar to differentiate.

        text: [L] losses; flow: [target tokens] losses; text_task, flow_task: int64, index in TASKS of each of them.
        """
        with torch.no_grad():
            sums = _sums_by_task(text, text_task, TEXT_TASKS) | _sums_by_task(flow, flow_task, FLOW_TASKS)
            self.sums += torch.stack([sums[task] for task in TASKS])
        # A loss without tokens adds an exact zero but stays in the graph: every rank differentiates the same modules.
        (_, text_weight, num_text), (_, flow_weight, num_flow) = self.counts.terms(self.config)
        return text.sum() * (text_weight / max(num_text, 1)) + flow.sum() * (flow_weight / max(num_flow, 1))


def losses(sums: Sequence[float], counts: Counts, config: LossConfig) -> dict[str, float]:
    """Logged values from sums over all ranks, in the order of TASKS: `loss` and, where a task is present,
    `loss/TASK`."""
    by_task = dict(zip(TASKS, sums, strict=True))
    values = {f"loss/{task}": by_task[task] / number for task in TASKS if (number := counts.of([task]))}
    total = sum(
        weight * sum(by_task[task] for task in tasks) / number
        for tasks, weight, number in counts.terms(config)
        if number
    )
    return {"loss": float(total), **values}


def _sums_by_task(losses: Tensor, task: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Sum of each task's losses; the first task takes what the others leave, so a lone task needs no mask."""
    first, *others = tasks
    zero, indices = torch.zeros((), device=losses.device), {name: index for index, name in enumerate(TASKS)}
    sums = {name: torch.where(task == indices[name], losses, zero).sum() for name in others}
    rest = losses.sum()
    for value in sums.values():
        rest = rest - value
    return {first: rest, **sums}
