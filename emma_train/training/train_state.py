"""Counters of a run that its checkpoints carry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emma_train.config.mix import TASK_NAMES
from emma_train.training.step_totals import StepTotals

OLD_NAMES = {
    "bad_samples": "unreadable_samples",
    "left_out_samples": "dropped_samples",
    "refused_samples": "too_long_samples",
}
"""Names that older checkpoints use."""


@dataclass
class TrainState:
    """What a run has done so far, over all ranks."""

    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    untrained_steps: int = 0
    """Steps in skip_windows that the run has passed."""
    skip_windows: list[list[int]] = field(default_factory=list)
    """[first, last] of steps that are not trained: those of health.skip_steps and of rewinds."""
    unreadable_samples: int = 0
    """Samples that could not be read, failed substitutes included."""
    replaced_samples: int = 0
    """Planned samples for which a substitute was read."""
    dropped_samples: int = 0
    """Planned samples for which nothing could be read."""
    too_long_samples: int = 0
    """Samples that were too long for any pack; others were taken instead."""
    unsuitable_samples: int = 0
    """Samples with an image below min_side or beyond max_aspect; others were taken instead."""
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASK_NAMES, 0))
    """Samples trained on, by task."""
    tokens: int = 0
    """Tokens of the decoder trained on; a run that resumes from a checkpoint of version 0.1.0 counts from there."""
    validation_digest: str = ""
    """Of the held-out samples that `best_validation` was measured on."""
    best_validation: dict[str, Any] = field(default_factory=dict)
    """Best values of the metrics that the forgetting guard watches."""

    @classmethod
    def from_checkpoint(cls, stored: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint's `done` holds, whatever version wrote it."""
        return cls(**{OLD_NAMES.get(name, name): value for name, value in stored.items()})

    def add(self, totals: StepTotals) -> None:
        """Count the samples and tokens of one step."""
        self.tokens += totals.tokens
        self.unreadable_samples += totals.unreadable
        self.replaced_samples += totals.replaced
        self.dropped_samples += totals.dropped
        for task, number in totals.samples.items():
            self.seen[task] = self.seen.get(task, 0) + number
