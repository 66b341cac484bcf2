"""What charts compute: smoothing, downsampling, ticks."""

import re

import numpy as np
import pytest

from emma_train.report.charts import (
    MAX_POINTS,
    Axis,
    Band,
    Series,
    StartMark,
    downsample,
    line_chart,
    nice_ticks,
    smoothed,
    tick_names,
)
from emma_train.report.numbers import short_number
from emma_train.report.scores import reaches, score_bar


def axis(*lengths: int) -> Axis:
    ends = np.cumsum([0, *lengths])
    bands = [Band(f"Stage {i}", f"S{i}", a, b) for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    steps = np.concatenate([np.arange(1, n + 1) for n in lengths])
    return Axis(np.arange(1.0, ends[-1] + 1), steps, np.repeat(np.arange(len(lengths)), lengths), bands)


def test_smoothing_keeps_a_constant_and_does_not_cross_stages() -> None:
    y = np.concatenate([np.full(100, 5.0), np.full(80, 1.0)])
    y[50] = np.nan
    assert smoothed(axis(100, 80), y) == pytest.approx(np.concatenate([np.full(100, 5.0), np.full(80, 1.0)]))


def test_smoothing_lowers_noise_and_survives_short_and_empty_stages() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(axis(1000), noise).std() < 0.3
    assert smoothed(axis(1, 2), np.array([3.0, 1.0, np.nan]))[0] == 3.0
    assert np.isnan(smoothed(axis(5), np.full(5, np.nan))).all()


def test_downsampling_keeps_spikes_and_skips_gaps() -> None:
    y = np.zeros(50_000)
    y[12_345], y[30_000] = 99.0, np.nan
    kept = downsample(y, 1000, envelope=True)
    assert len(kept) <= 1000 and 12_345 in kept and 30_000 not in kept and (np.diff(kept) > 0).all()
    assert len(downsample(y, 1000, envelope=False)) <= 1000


def test_a_long_run_draws_at_most_the_points_that_a_page_can_hold() -> None:
    y = np.random.default_rng(0).normal(size=30_000)
    chart = line_chart(axis(20_000, 10_000), "k", "T", "n", [Series("a", "c-ink", y)], smooth=True)
    assert chart is not None
    for path in chart.html.split('d="')[1:]:
        d = path.split('"')[0]
        assert d.count("L") + d.count("M") <= MAX_POINTS
    assert len(chart.hover[0]["y"]) <= 400


def test_a_chart_without_a_finite_value_is_none_and_one_value_is_drawn() -> None:
    assert line_chart(axis(3), "k", "T", "n", [Series("a", "c-ink", np.full(3, np.nan))]) is None
    chart = line_chart(axis(1), "k", "T", "n", [Series("a", "c-ink", np.array([0.0]))], smooth=True, log_switch=True)
    assert chart is not None and "nan" not in chart.html


def test_a_wide_range_starts_on_a_log_scale_and_negative_values_have_none() -> None:
    wide = line_chart(axis(50), "k", "T", "n", [Series("a", "c-ink", np.geomspace(1e-3, 10, 50))], log_switch=True)
    below = line_chart(axis(50), "k", "T", "n", [Series("a", "c-ink", np.linspace(-1, 10, 50))], log_switch=True)
    assert wide is not None and '<input type="checkbox" checked>' in wide.html
    assert below is not None and "checkbox" not in below.html


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.13, 0.87, [0.2, 0.4, 0.6, 0.8]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0312, "0.0312"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (12345.0, "12.3k"), (float("nan"), "nan")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


def test_a_bar_is_met_in_the_direction_of_the_score() -> None:
    assert reaches(0.6, 0.6, True) and not reaches(0.5, 0.6, True)
    assert reaches(0.5, 0.6, False) and not reaches(float("nan"), 0.6, False)
    assert 'class="track met"' in score_bar(0.5, 0.6, 1.0, False)
    assert 'class="track missed"' in score_bar(float("nan"), 0.6, None, True)
    assert "width:83.00%" in score_bar(0.83, None, 0.1, True)


def y_labels(html: str) -> list[str]:
    match = re.search(r'<div class="ys lin">(.*?)</div>', html)
    assert match
    return re.findall(r">([^<]+)</i>", match[1])


@pytest.mark.parametrize("value", [0.0, 1.0, 1.0003, -3.0, 5e-5, 123456.0])
@pytest.mark.parametrize("wobble", [0.0, 1e-4])
def test_labels_of_a_flat_line_differ_and_it_looks_flat(value: float, wobble: float) -> None:
    y = value * (1 + wobble * np.sin(np.arange(50.0)))
    chart = line_chart(axis(50), "k", "T", "n", [Series("a", "c-ink", y)])
    assert chart is not None
    labels = y_labels(chart.html)
    assert len(labels) >= 2 and len(set(labels)) == len(labels)
    (path,) = re.findall(r'class="line c-ink" d="M([^"]+)"', chart.html)
    heights = [float(point.split(",")[1]) for point in path.split("L")]
    assert max(heights) - min(heights) <= 20  # of 1000
    assert min(heights) >= 0 and max(heights) <= 1000


def test_ticks_have_the_digits_that_tell_them_apart() -> None:
    assert tick_names([0.9998, 1.0, 1.0002]) == ["0.9998", "1", "1.0002"]
    assert tick_names([10_000, 10_010, 10_020]) == ["10k", "10.01k", "10.02k"]
    assert tick_names([1.01e-5, 1.02e-5]) == ["1.01e-5", "1.02e-5"]
    assert tick_names([0, 0.5, 1]) == ["0", "0.5", "1"]


def test_restarts_are_marked_where_the_steps_go_on() -> None:
    two = axis(100, 100)
    starts = [StartMark(x, num_ranks) for x, num_ranks in ((0, 4), (30, 4), (30, 2), (32, 8), (100, 8), (190, 2))]
    marked = Axis(two.x, two.step, two.band, two.bands, starts)
    assert marked.restarts == [30, 32, 190]
    y = Series("a", "c-ink", np.linspace(1, 2, 200))
    chart = line_chart(marked, "k", "T", "n", [y], tall=True)
    assert chart is not None
    assert re.findall(r'class="restart" d="M([\d.]+),0V1000"', chart.html) == ["150.0", "160.0", "950.0"]
    labels = re.findall(r'<span[^>]*style="((?:left|right):[\d.]+%)">(\d+(?: ranks)?)</span>', chart.html)
    assert labels == [("left:0.00%", "4 ranks"), ("left:15.00%", "2"), ("right:5.00%", "2")]  # 8 is too near to 2
    plain = line_chart(two, "k", "T", "n", [y], tall=True)
    assert plain is not None and "restart" not in plain.html and 'class="ranks"' not in plain.html
