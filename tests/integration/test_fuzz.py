"""Every config field with wrong values: one line, or three finite steps (tests/fuzz.py, docs/reliability.md)."""

import pytest

from tests.fuzz import check_recipe_case, recipe_cases, try_recipe

TRAINED = ("loss.ce_weight=zero", "optimizer.betas=[zero] * 2", "model.decoder.heads=one")
EVERY = 61
"""Of the cases, one in so many is a sample."""


def test_a_sample_of_the_wrong_values_is_refused_or_passes() -> None:
    results = {str(case): check_recipe_case(case) for case in recipe_cases()[::EVERY]}
    assert {name: result for name, result in results.items() if result not in ("refused", "passed")} == {}
    assert sum(result == "refused" for result in results.values()) > len(results) / 2


@pytest.mark.parametrize("name", TRAINED)
def test_what_passes_the_checks_trains(name: str) -> None:
    (case,) = [case for case in recipe_cases() if str(case) == name]
    assert check_recipe_case(case) == "passed"
    assert try_recipe(case) == "trained"
