"""The forgetting guard: compares each validation with the best before it. Pure functions; the best values are part of
TrainState, so that a resumed run keeps them.

Fine-tuning on generation alone can destroy understanding within some thousand steps (BAGEL's issues 192 and 292), which
no training loss shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emma_train.config.schema import GuardConfig
from emma_train.errors import RankFailure, RunError

ANSWERS, I2T_LOSS = "val/answers", "val/loss/i2t"
"""Watched metrics, of the weights themselves: averages would show a loss too late."""

Best = dict[str, Any]
"""By watched metric its best value, and under `METRIC step` the step of it."""


def find_losses(values: Mapping[str, float], best: Mapping[str, Any], config: GuardConfig) -> list[str]:
    """A line for each watched metric that is too far from its best; none where all is well."""
    lines = []
    if ANSWERS in values and ANSWERS in best and config.max_drop < 1:
        now, before = values[ANSWERS], best[ANSWERS]
        if before - now > config.max_drop:
            lines.append(
                f"right answers fell from {before:.1%} at step {best[f'{ANSWERS} step']} to {now:.1%} "
                f"(validate.guard.max_drop={config.max_drop:g})"
            )
    if I2T_LOSS in values and I2T_LOSS in best:
        now, before = values[I2T_LOSS], best[I2T_LOSS]
        if not now <= before * (1 + config.max_rise):  # NaN is too far as well
            lines.append(
                f"the held-out I2T loss rose from {before:.4g} at step {best[f'{I2T_LOSS} step']} to {now:.4g} "
                f"(validate.guard.max_rise={config.max_rise:g})"
            )
    return lines


def with_better(values: Mapping[str, float], best: Mapping[str, Any], step: int) -> Best:
    """The best values after a validation of `step`."""
    result = dict(best)
    for name, sign in ((ANSWERS, 1), (I2T_LOSS, -1)):
        value = values.get(name, math.nan)
        if math.isfinite(value) and (name not in best or sign * value > sign * best[name]):
            result |= {name: value, f"{name} step": step}
    return result


def forgetting_error(rank: int, step: int, lines: Sequence[str]) -> RunError | RankFailure:
    """The error that ends a run with validate.guard.stop: with a text on the main rank only, since every rank has
    it."""
    if rank:
        return RankFailure()
    return RunError(
        f"step {step}: understanding is being forgotten: {'; '.join(lines)}. The checkpoint of this step is written; "
        "go on from an earlier one in a new run (init.from) with a lower optimizer.lr or a larger mix.i2t, or from "
        "this one with validate.guard.stop=false"
    )
