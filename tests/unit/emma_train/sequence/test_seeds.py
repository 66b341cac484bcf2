"""Contract 1: what is random is a pure function of its names, today and on every machine."""

import numpy as np

from emma_train.sequence.seeds import choice_of, seed_of, uniform_of


def test_values_never_change() -> None:
    assert seed_of(0, 0, "a", "noise") == 987850507269370422
    assert seed_of(7, 3, "köy/🐟", "time") == 4713484131332918715
    assert uniform_of(0, 0, "a", "dropout") == 0.379564871235635
    assert [choice_of(5, 0, epoch, "a", "alternative") for epoch in range(8)] == [4, 3, 4, 1, 3, 3, 3, 3]


def test_each_name_matters_and_none_runs_into_the_next() -> None:
    base = seed_of(1, 2, "key", "what")
    others = [
        seed_of(2, 2, "key", "what"),
        seed_of(1, 3, "key", "what"),
        seed_of(1, 2, "kez", "what"),
        seed_of(1, 2, "key", "whas"),
        seed_of(12, 0, "key", "what"),
        seed_of(1, 20, "key", "what"),
        seed_of(1, 2, "keyw", "hat"),
    ]
    assert len({base, *others}) == len(others) + 1
    assert all(0 <= s < 1 << 63 for s in (base, *others))


def test_uniforms_are_uniform() -> None:
    values = np.sort([uniform_of(0, 0, str(i), "x") for i in range(20000)])
    assert values[0] >= 0 and values[-1] < 1
    steps = np.arange(1, 20001) / 20000
    assert np.abs(values - steps).max() < 1.63 / np.sqrt(20000)  # Kolmogorov-Smirnov at 1 %
    assert abs(values.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 20000)


def test_choices_are_even() -> None:
    counts = np.bincount([choice_of(7, 0, 0, str(i), "x") for i in range(14000)], minlength=7)
    assert ((counts - 2000) ** 2 / 2000).sum() < 16.8  # chi-square, 6 degrees of freedom, 1 %


def test_epochs_and_kinds_are_uncorrelated() -> None:
    columns = [[uniform_of(0, e, str(i), w) for i in range(4000)] for e, w in ((0, "x"), (1, "x"), (0, "y"))]
    correlations = np.corrcoef(columns) - np.eye(3)
    assert np.abs(correlations).max() < 4 / np.sqrt(4000)
