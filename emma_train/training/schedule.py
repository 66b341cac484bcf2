"""Learning rate as a pure function of the step."""

import math

from emma_train.config.schema import ScheduleConfig


def learning_rate(step: int, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (1 to total_steps): linear warm-up, then constant, or a cosine down to
    min_ratio * peak."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * cosine)
