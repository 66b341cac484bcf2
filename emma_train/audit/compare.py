"""What differs between two records of one stage."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from emma_train.audit.run_record import DIGESTS, Difference, RunRecord
from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint.dcp_reader import CheckpointTensors
from emma_train.errors import UserError
from emma_train.storage.paths import StoragePath

WITHOUT_EFFECT_ON_LOSS = "k_proj.bias"
"""The end of the names of tensors that change no loss: a bias of the keys adds the same number to all scores of a
query, and softmax ignores it. Its gradient is only rounding error, and Adam makes steps of full size from that."""


@dataclass(frozen=True)
class Largest:
    """The largest difference of one kind of number, equal or not."""

    compared: int = 0
    """Losses, or checkpoints."""
    difference: float = 0.0
    step: int | None = None
    name: str = ""
    """Of the loss or the tensor."""

    def joined(self, difference: float, step: int, name: str) -> "Largest":
        """With one more number."""
        if difference > self.difference:
            return Largest(self.compared, difference, step, name)
        return self


def differing_digests(one: RunRecord, other: RunRecord, steps: range) -> list[Difference]:
    """For each digest, the first of the steps in which it differs."""
    result = []
    for digest in DIGESTS:
        for step in steps:
            ours, theirs = (record.digests.get(step, {}).get(digest) for record in (one, other))
            if ours is not None and theirs is not None and ours != theirs:
                result.append(_difference(step, digest, (ours, theirs), (one, other)))
                break
    return result


def differing_losses(one: RunRecord, other: RunRecord, margin: float) -> tuple[list[Difference], Largest]:
    """The first loss of the steps that both have logged which differs by more than `margin` times its value."""
    differences: list[Difference] = []
    steps = sorted(one.losses.keys() & other.losses.keys())
    largest = Largest(len(steps))
    for step in steps:
        ours, theirs = one.losses[step], other.losses[step]
        for name in sorted(ours.keys() | theirs.keys()):
            values = (ours.get(name), theirs.get(name))
            difference = relative_difference(*values)
            largest = largest.joined(difference, step, name)
            if difference > margin and not differences:
                differences.append(_difference(step, name, values, (one, other)))
    return differences, largest


def relative_difference(one: float | None, other: float | None) -> float:
    """|one - other| over the larger of both; infinity where only one is a number."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0


def differing_weights(
    one: RunRecord, other: RunRecord, margin: float, with_optimizer: bool
) -> tuple[list[Difference], Largest]:
    """The first tensor of the checkpoints of the same steps which differs by more than `margin`.

    With a margin, tensors that are WITHOUT_EFFECT_ON_LOSS are left out. Tensors are read one at a time. Raises
    UserError where a checkpoint is damaged.
    """
    steps = sorted(one.checkpoints.keys() & other.checkpoints.keys())
    largest = Largest(len(steps))
    for step in steps:
        ours, theirs = (_tensors(record.checkpoints[step]) for record in (one, other))
        names = sorted(name for name in ours.specs.keys() | theirs.specs.keys())
        for name in names:
            if name.startswith("optimizer.") and not with_optimizer:
                continue
            if ours.specs.get(name) != theirs.specs.get(name):
                values: tuple[Any, Any] = (str(ours.specs.get(name)), str(theirs.specs.get(name)))
                return [_difference(step, "weights", values, (one, other), name)], largest
            if margin and name.endswith(WITHOUT_EFFECT_ON_LOSS):
                continue
            first, second = ours.read(name), theirs.read(name)
            difference = 0.0 if torch.equal(first, second) else _largest_difference(first, second)
            largest = largest.joined(difference, step, name)
            if difference > margin:
                index = int((first.double() - second.double()).abs().nan_to_num(math.inf).argmax())
                values = (float(first.flatten()[index]), float(second.flatten()[index]))
                return [_difference(step, "weights", values, (one, other), name)], largest
    return [], largest


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """max |first - second|; infinity where one of them is not a number."""
    return float((first.double() - second.double()).abs().nan_to_num(math.inf).max())


def _tensors(checkpoint: StoragePath) -> CheckpointTensors:
    if problem := verify.find_damage(checkpoint):
        raise UserError(f"{checkpoint}: {problem}; move it away to audit without it")
    return CheckpointTensors(dcp.dcp_folders(checkpoint))


def _difference(
    step: int, quantity: str, values: tuple[Any, Any], runs: tuple[RunRecord, RunRecord], tensor: str | None = None
) -> Difference:
    subject = f"{quantity} ({tensor})" if tensor else quantity
    one, other = (f"{value} in {run.folder}" for value, run in zip(values, runs, strict=True))
    return Difference(step, quantity, f"step {step}: {subject} is {one} and {other}", values, tensor)
