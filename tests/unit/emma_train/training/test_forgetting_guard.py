"""The forgetting guard: what is too far from the best, and what the best is."""

import math
from typing import Any

import pytest

from emma_train.config.schema import GuardConfig
from emma_train.errors import RankFailure, RunError
from emma_train.training.forgetting_guard import find_losses, forgetting_error, with_better

BEST: dict[str, Any] = {"val/answers": 0.8, "val/answers step": 20, "val/loss/i2t": 2.0, "val/loss/i2t step": 40}


@pytest.mark.parametrize(
    ("answers", "loss", "num_lines"),
    [(0.8, 2.0, 0), (0.71, 2.19, 0), (0.69, 2.0, 1), (0.8, 2.21, 1), (0.0, 9.0, 2), (0.9, math.nan, 1), (1.0, 0.1, 0)],
)
def test_a_value_beyond_its_margin_is_a_line(answers: float, loss: float, num_lines: int) -> None:
    lines = find_losses({"val/answers": answers, "val/loss/i2t": loss}, BEST, GuardConfig())
    assert len(lines) == num_lines
    assert all("step 20" in line or "step 40" in line for line in lines)


def test_the_margins_are_those_of_the_recipe() -> None:
    values = {"val/answers": 0.0, "val/loss/i2t": 3.9}
    assert find_losses(values, BEST, GuardConfig(max_drop=1.0, max_rise=1.0)) == []
    assert len(find_losses(values, BEST, GuardConfig(max_drop=0.79, max_rise=0.94))) == 2


def test_nothing_is_compared_before_there_is_a_best_or_where_it_is_not_measured() -> None:
    assert find_losses({"val/answers": 0.0, "val/loss/i2t": 99.0}, {}, GuardConfig()) == []
    assert find_losses({"val/loss/t2i": 99.0}, BEST, GuardConfig()) == []


def test_the_best_of_each_value_stays_with_its_step() -> None:
    best: dict[str, Any] = {}
    for step, answers, loss in ((1, 0.2, 3.0), (10, 0.5, 3.5), (20, 0.4, 2.0), (30, 0.5, math.nan)):
        best = with_better({"val/answers": answers, "val/loss/i2t": loss, "val/loss": 0.0}, best, step)
    assert best == {"val/answers": 0.5, "val/answers step": 10, "val/loss/i2t": 2.0, "val/loss/i2t step": 20}


def test_the_main_rank_alone_prints_why_the_run_ends() -> None:
    error = forgetting_error(0, 60, ["right answers fell"])
    assert isinstance(error, RunError) and "step 60" in str(error) and "right answers fell" in str(error)
    assert "\n" not in str(error)
    assert isinstance(forgetting_error(1, 60, []), RankFailure)
