"""Paired differences in closed form, and what the table says of them."""

import math

import pytest

from emma_train.ablation.results import TrialResult
from emma_train.ablation.table import ablation_table, paired


def result(arm: str, seed: int, **metrics: float) -> TrialResult:
    return TrialResult(arm, seed, "abc", "r", 1000, 500 + seed, 2e12, 60.0, "cpu", metrics)


def test_what_the_runs_of_a_seed_share_cancels() -> None:
    first = {0: 10.0, 1: 20.0, 2: 60.0}
    pair = paired({seed: value + seed + 1 for seed, value in first.items()}, first)
    assert pair is not None and pair.num == 3 and pair.mean == 32.0 and pair.difference == 2.0
    assert pair.stderr == pytest.approx(1 / math.sqrt(3))  # of 1, 2, 3; seeds differ by far more
    assert pair.detectable == pytest.approx(5.36 / math.sqrt(3))


def test_only_seeds_of_both_count_and_one_has_no_error() -> None:
    pair = paired({0: 1.0, 5: 9.0}, {0: 0.5, 1: 100.0})
    assert pair is not None and (pair.num, pair.mean, pair.difference) == (1, 1.0, 0.5)
    assert pair.stderr is None and pair.detectable is None
    assert paired({5: 1.0}, {0: 1.0}) is None


def test_detectable_effects_are_those_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    from emma_train.ablation.table import DETECTABLE, MANY

    for num, factor in DETECTABLE.items():
        assert factor == pytest.approx(stats.t.ppf(0.975, num - 1) + stats.t.ppf(0.8, num - 1), abs=6e-3)
    assert stats.norm.ppf(0.975) + stats.norm.ppf(0.8) < MANY < DETECTABLE[10]


def test_the_table_has_quality_beside_cost() -> None:
    results = [result("a", seed, loss=1.0 + seed) for seed in range(3)]
    results += [result("b", seed, loss=1.5 + seed, other=0.25) for seed in range(2)]
    lines = ablation_table("Why?", ["a", "b", "c"], ["loss", "other", "absent"], results).splitlines()
    assert lines[0] == "**Why?**"
    assert lines[4] == "| arm | seeds | loss | other | parameters | tokens | FLOPs | seconds |"
    assert lines[6] == "| a | 3 | 2.0000 | – | 1,000 | 501 | 2e+12 | 60 |"
    assert lines[7] == "| b | 2 | 2.0000 (+0.5000 ± 0.0000) | 0.2500 | 1,000 | 500 | 2e+12 | 60 |"
    assert lines[8].startswith("| c | 0 |") and all(line.count("|") == 9 for line in lines[4:9])
    assert lines[-1].startswith("No standard errors")  # the differences of both seeds are 0.5
    results[3] = result("b", 0, loss=1.25, other=0.25)
    assert ablation_table("", ["a", "b"], ["loss", "other"], results).splitlines()[-1] == "| b | 1.7600 | – |"
    assert "| arm | seeds | parameters |" in ablation_table("", ["a", "b"], ["loss"], [])  # before the first result
    assert "no difference can be told" in ablation_table("", ["a", "b"], ["loss"], results[2:4])
