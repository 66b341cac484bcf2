"""The learning rate in closed form."""

import math

import pytest

from emma_train.config.schema import ScheduleConfig
from emma_train.training.schedule import learning_rate


def rates(schedule: ScheduleConfig, steps: int, peak: float = 1e-3) -> list[float]:
    return [learning_rate(step, peak, steps, schedule) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step() -> None:
    for kind in ("constant", "cosine"):
        got = rates(ScheduleConfig(kind, warmup_steps=5), 20)
        assert got[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3], rel=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(ScheduleConfig("constant", warmup_steps=3), 20)[2:]) == {1e-3}
    assert set(rates(ScheduleConfig("constant"), 7)) == {1e-3}


@pytest.mark.parametrize(("warmup", "ratio"), [(0, 0.0), (4, 0.1), (10, 0.5)])
def test_cosine_falls_from_the_peak_to_its_end(warmup: int, ratio: float) -> None:
    steps, peak = 50, 2e-4
    got = rates(ScheduleConfig("cosine", warmup, ratio), steps, peak)
    for step in range(warmup + 1, steps + 1):
        turn = math.cos(math.pi * (step - warmup) / (steps - warmup))
        assert got[step - 1] == pytest.approx(peak * ratio + peak * (1 - ratio) * (1 + turn) / 2, rel=1e-12, abs=1e-18)
    assert got[-1] == pytest.approx(peak * ratio, abs=1e-18)
    falling = got[max(warmup - 1, 0) :]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
    middle = (steps + warmup) // 2
    assert got[middle - 1] == pytest.approx(peak * (1 + ratio) / 2)


def test_degenerate_lengths_give_finite_rates() -> None:
    assert rates(ScheduleConfig("cosine", warmup_steps=5), 5)[-1] == 1e-3
    assert rates(ScheduleConfig("cosine", warmup_steps=9), 5)[-1] == pytest.approx(1e-3 * 5 / 9)
    assert rates(ScheduleConfig("cosine"), 1) == [0.0]
