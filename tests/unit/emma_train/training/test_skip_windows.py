"""Windows of steps that are not trained."""

import pytest

from emma_train.config.check import check_recipe
from emma_train.errors import UserError
from emma_train.training.skip_windows import after, is_inside, merged
from tests.helpers import tiny_recipe


def test_windows_that_overlap_or_touch_are_one() -> None:
    assert merged([]) == []
    assert merged([(7, 9), (1, 2), (3, 3), (8, 12), (20, 21)]) == [[1, 3], [7, 12], [20, 21]]
    assert merged([(1, 9), (2, 3)]) == [[1, 9]]


def test_what_comes_after_a_step() -> None:
    assert after(5, [(1, 5), (4, 8), (9, 9)]) == [[6, 8], [9, 9]]


def test_both_ends_are_inside() -> None:
    assert [step for step in range(8) if is_inside(step, [[2, 3], [6, 6]])] == [2, 3, 6]


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(UserError, match="health.skip_steps has a window from 5 to 4"):
        check_recipe(tiny_recipe(health__skip_steps=[{"first": 5, "last": 4}]), "test")
