"""Charts as HTML with inline SVG, without a library: lines over the steps of a run, sparklines.

Lines are drawn in a box of 1000 x 1000 that the page stretches, with labels as HTML over it: a chart is as wide as the
page, and its letters keep their size on a phone. Only the values under the pointer need JavaScript.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from emma_train.report.numbers import short_number

MAX_POINTS = 1000  # of a drawn line, over the whole run
MAX_HOVER_POINTS = 400
MIN_SPAN = 0.02
"""Least range of a linear y axis, as a share of the largest value."""
MIN_LABEL_GAP = 3.0
"""Least distance of two numbers of ranks, in percent of the axis; three times as much on a phone."""


@dataclass(frozen=True)
class Band:
    """The part of the x axis that is one stage: [start, end] in steps since the beginning of the pipeline."""

    label: str
    short: str
    start: float
    end: float


@dataclass(frozen=True)
class StartMark:
    """A start of the run: its steps come after `x`, in steps since the beginning of the pipeline."""

    x: float
    num_ranks: int


@dataclass(frozen=True)
class Axis:
    """The x axis that all charts of a page share. x, step, band: (num_records,), in order; band: index of bands."""

    x: np.ndarray
    step: np.ndarray
    band: np.ndarray
    bands: list[Band]
    starts: list[StartMark] = field(default_factory=list)

    @property
    def restarts(self) -> list[float]:
        """Where the run was started again in the middle of a stage, each point once."""
        edges = {band.start for band in self.bands}
        return sorted({start.x for start in self.starts if start.x not in edges and 0 < start.x < self.end})

    @property
    def end(self) -> float:
        return max((band.end for band in self.bands), default=1.0) or 1.0

    def segments(self) -> Iterator[slice]:
        """The records of each stage; a line ends where its stage ends."""
        edges = np.flatnonzero(np.diff(self.band)) + 1
        for start, stop in zip([0, *edges], [*edges, len(self.band)], strict=True):
            yield slice(int(start), int(stop))

    def hover(self) -> np.ndarray:
        """Indices of the records whose values the pointer shows."""
        return np.unique(np.linspace(0, len(self.x) - 1, min(len(self.x), MAX_HOVER_POINTS)).round().astype(int))


@dataclass(frozen=True)
class Series:
    """One line. y: (num_records,), NaN where nothing was measured. color: a `c-…` class of the page."""

    name: str
    color: str
    y: np.ndarray


@dataclass(frozen=True)
class Chart:
    """HTML of a chart, and what its tooltip shows: for each line name, colour, raw values, smoothed ones or None."""

    key: str
    html: str
    hover: list[dict[str, Any]]


def line_chart(
    axis: Axis,
    key: str,
    title: str,
    note: str,
    series: Sequence[Series],
    smooth: bool = False,
    log_switch: bool = False,
    from_zero: bool = False,
    tall: bool = False,
) -> Chart | None:
    """A chart of lines over the run, None where no line has a finite value. note: unit and meaning, under the title.

    smooth: a bold smoothed line over the light raw one. log_switch: a switch between a logarithmic and a linear y axis.
    """
    series = [line for line in series if np.isfinite(line.y).any()]
    if not series or not len(axis.x):
        return None
    averages = [smoothed(axis, line.y) if smooth else None for line in series]
    bold = [line.y if average is None else average for line, average in zip(series, averages, strict=True)]
    headroom = 0.1 if tall and len(axis.bands) > 1 else 0.04  # for the names of the stages
    scales, starts_log = _scales(series, bold, log_switch, from_zero, headroom)
    lines = _Lines(axis, series, averages, bold, filled=len(series) == 1 and not tall)
    shapes = "".join(f'<g class="{name}">{lines.shapes(scale)}</g>' for name, scale in scales)
    checked = " checked" if starts_log else ""
    switch = f'<label class="switch"><input type="checkbox"{checked}><span>log scale</span></label>'
    legend = "".join(f'<li class="{line.color}">{escape(line.name)}</li>' for line in series)
    legend = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
    kinds = "chart" + (" tall" if tall else "") + (" linear" if len(scales) == 1 else "")
    html = (
        f'<figure class="{kinds}" data-chart="{escape(key)}">'
        f"<figcaption><div><h3>{escape(title)}</h3><p>{escape(note)}</p></div>{legend}"
        f"{switch if len(scales) > 1 else ''}</figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(_spoken(title, series, bold))}">'
        f"{''.join(_y_labels(name, scale) for name, scale in scales)}"
        f'<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f"{_band_shapes(axis)}{_restart_shapes(axis)}{shapes}</svg>"
        f"{_band_labels(axis) + _rank_labels(axis) if tall else ''}"
        f'<i class="cursor"></i></div>{_x_labels(axis)}</div></figure>'
    )
    return Chart(key, html, lines.hover_values())


@dataclass(frozen=True)
class _Lines:
    """The lines of one chart: raw values, smoothed ones or None, and `bold`, the smoothed ones or else the raw ones."""

    axis: Axis
    series: Sequence[Series]
    averages: Sequence[np.ndarray | None]
    bold: Sequence[np.ndarray]
    filled: bool
    """Fill the area under a line."""

    def shapes(self, scale: "_Scale") -> str:
        """Grid and lines as SVG paths; light raw lines are below all bold ones."""
        paths = [f'<path class="grid" d="M0,{scale(tick):.1f}H1000"/>' for tick in scale.ticks()]
        for line, average in zip(self.series, self.averages, strict=True):
            if average is not None:
                raw = _path(self.axis, line.y, scale, envelope=True)
                paths.append(f'<path class="raw {line.color}" d="{raw}"/>')
        for line, y in zip(self.series, self.bold, strict=True):
            if self.filled:
                paths.append(f'<path class="fill {line.color}" d="{_path(self.axis, y, scale, closed=True)}"/>')
            paths.append(f'<path class="line {line.color}" d="{_path(self.axis, y, scale)}"/>')
        return "".join(paths)

    def hover_values(self) -> list[dict[str, Any]]:
        """For each line what the tooltip shows, at the records of `Axis.hover`."""
        hover = self.axis.hover()
        return [
            {
                "name": line.name,
                "color": line.color,
                "y": _rounded(line.y[hover]),
                "mean": None if average is None else _rounded(average[hover]),
            }
            for line, average in zip(self.series, self.averages, strict=True)
        ]


def _scales(
    series: Sequence[Series], bold: Sequence[np.ndarray], log_switch: bool, from_zero: bool, headroom: float
) -> tuple[list[tuple[str, "_Scale"]], bool]:
    """The linear y scale and, if asked for and possible, the logarithmic one; whether the chart starts with that."""
    low, high = _value_range(series, bold, from_zero)
    linear = ("lin", _Scale(low, high, headroom))
    positive = min((float(y[y > 0].min()) for y in bold if (y > 0).any()), default=math.inf)
    if not log_switch or low < 0 or positive >= high:
        return [linear], False
    logarithmic = ("log", _Scale(max(low, positive * 0.8), high, headroom, log=True))
    return [linear, logarithmic], high / positive > 20


def _y_labels(name: str, scale: "_Scale") -> str:
    ticks = scale.ticks()
    names = zip(ticks, tick_names(ticks), strict=True)
    marks = "".join(f'<i style="top:{scale(tick) / 10:.2f}%">{name}</i>' for tick, name in names)
    return f'<div class="ys {name}">{marks}</div>'


def sparkline(y: np.ndarray, color: str) -> str:
    """A small line without axes. y: (num_points,), smoothed already."""
    y = y[np.isfinite(y)]
    if len(y) < 2:
        return '<svg class="spark" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true"></svg>'
    y = y[np.unique(np.linspace(0, len(y) - 1, 120).round().astype(int))]
    # The height is at least a third of the mean value, so that a loss that hardly changes looks flat.
    middle, span = float(y.min() + y.max()) / 2, max(float(y.max() - y.min()), abs(float(y.mean())) / 3)
    scale = _Scale(middle - span / 2, middle + span / 2)
    x = np.linspace(0, 1000, len(y))
    d = "M" + "L".join(f"{a:.0f},{scale(b) * 0.92 + 40:.0f}" for a, b in zip(x, y, strict=True))
    return (
        '<svg class="spark" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="fill {color}" d="{d}V1000H0Z"/><path class="line {color}" d="{d}"/></svg>'
    )


def smoothed(axis: Axis, y: np.ndarray) -> np.ndarray:
    """A Gaussian mean, stage by stage, that skips NaN and, being centred, does not lag. y: (num_records,)."""
    result = np.full(len(y), np.nan)
    for part in axis.segments():
        values = y[part]
        finite = np.isfinite(values)
        if not finite.any():
            continue
        sigma = min(max(1.0, len(values) / 60), 500.0)
        reach = min(int(3 * sigma), max(1, (len(values) - 1) // 2))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        if len(values) < len(kernel):
            result[part] = values
            continue
        weight = np.convolve(finite.astype(float), kernel, "same")
        total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
        result[part] = np.where(weight > 1e-9, total / np.maximum(weight, 1e-9), np.nan)
    return result


def downsample(y: np.ndarray, limit: int, envelope: bool) -> np.ndarray:
    """Indices of at most `limit` values of y; with `envelope` the extremes of each bucket, so that spikes stay."""
    indices = np.flatnonzero(np.isfinite(y))
    if len(indices) <= limit:
        return indices
    if not envelope:
        return indices[np.unique(np.linspace(0, len(indices) - 1, limit).round().astype(int))]
    kept = []
    for bucket in np.array_split(indices, max(1, limit // 2)):
        kept += sorted({int(bucket[y[bucket].argmin()]), int(bucket[y[bucket].argmax()])})
    return np.array(kept)


class _Scale:
    """Maps values to 1000 (bottom) .. 0 (top)."""

    def __init__(self, low: float, high: float, headroom: float = 0.04, log: bool = False) -> None:
        self.log = log
        if not log and low == high == 0:
            high = 1.0
        # A line that hardly moves looks flat, and the labels of its axis differ.
        if not log and (widened := MIN_SPAN * max(abs(low), abs(high)) - (high - low)) > 0:
            low, high = low - widened / 2, high + widened / 2
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        span = self.high - self.low
        self.high += headroom * span
        if log or self.low != 0:  # an axis that starts at zero starts at zero
            self.low -= 0.04 * span

    def __call__(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        return 1000 - 1000 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, 4)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            ticks = [f * 10.0**d for d in decades for f in factors if self.low <= math.log10(f * 10.0**d) <= self.high]
            if len(ticks) >= 3:
                break
        return ticks if len(ticks) >= 2 else [10**v for v in (self.low, self.high)]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values within [low, high], `about` so many."""
    rough = (high - low) / max(1, about)
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_names(ticks: Sequence[float]) -> list[str]:
    """The values in as few digits as tell them apart."""
    names: list[str] = []
    for num_digits in range(3, 8):
        names = [short_number(tick, num_digits) for tick in ticks]
        if len(set(names)) == len(names):
            break
    return names


def _value_range(series: Sequence[Series], bold: Sequence[np.ndarray], from_zero: bool) -> tuple[float, float]:
    """Range of the bold lines, and of the raw ones without their 0.2 % lowest and highest values."""
    ends = [0.0] if from_zero else []
    for line, y in zip(series, bold, strict=True):
        raw, mean = line.y[np.isfinite(line.y)], y[np.isfinite(y)]
        ends += [*np.quantile(raw, [0.002, 0.998]).tolist(), float(mean.min()), float(mean.max())]
    return min(ends), max(ends)


def _path(axis: Axis, y: np.ndarray, scale: _Scale, envelope: bool = False, closed: bool = False) -> str:
    parts = []
    for part in axis.segments():
        limit = max(2, MAX_POINTS * (part.stop - part.start) // max(1, len(y)))
        kept = part.start + downsample(y[part], limit, envelope)
        if not len(kept):
            continue
        points = [(1000 * axis.x[i] / axis.end, scale(float(y[i]))) for i in kept]
        if len(points) == 1:
            points.append((points[0][0] + 0.5, points[0][1]))
        d = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f"{d}V1000H{points[0][0]:.1f}Z" if closed else d)
    return "".join(parts)


def _band_shapes(axis: Axis) -> str:
    return "".join(
        f'<rect class="band" x="{1000 * band.start / axis.end:.1f}" y="0" '
        f'width="{1000 * (band.end - band.start) / axis.end:.1f}" height="1000"/>'
        for band in axis.bands[1::2]
    )


def _band_labels(axis: Axis) -> str:
    if len(axis.bands) < 2:
        return ""
    labels = []
    for band in axis.bands:
        share = (band.end - band.start) / axis.end
        roomy = "wide" if share > 0.3 else "some" if share > 0.11 else "tight" if share > 0.04 else "none"
        labels.append(
            f'<span class="{roomy}" style="left:{100 * band.start / axis.end:.2f}%;width:{100 * share:.2f}%">'
            f"<b>{escape(band.label)}</b><b>{escape(band.short)}</b></span>"
        )
    return f'<div class="bands">{"".join(labels)}</div>'


def _restart_shapes(axis: Axis) -> str:
    return "".join(f'<path class="restart" d="M{1000 * x / axis.end:.1f},0V1000"/>' for x in axis.restarts)


def _rank_labels(axis: Axis) -> str:
    """The number of ranks where it changes; those too near to the one before are left out."""
    changes = [
        start
        for before, start in zip([None, *axis.starts], axis.starts, strict=False)
        if before is None or before.num_ranks != start.num_ranks
    ]
    if len(changes) < 2:
        return ""
    labels: list[str] = []
    shown = -100.0
    for start in changes:
        share = 100 * start.x / axis.end
        if share - shown < MIN_LABEL_GAP:
            continue
        side = f"left:{share:.2f}%" if share < 85 else f"right:{100 - share:.2f}%"
        near = ' class="near"' if share - shown < 3 * MIN_LABEL_GAP else ""
        unit = "" if labels else " ranks"
        labels.append(f'<span{near} style="{side}">{start.num_ranks}{unit}</span>')
        shown = share
    return f'<div class="ranks">{"".join(labels)}</div>'


def _x_labels(axis: Axis) -> str:
    marks = "".join(
        f'<i style="left:{100 * t / axis.end:.2f}%">{short_number(t)}</i>' for t in nice_ticks(0, axis.end, 5)
    )
    return f'<div class="xs">{marks}</div>'


def _rounded(y: np.ndarray) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in y]


def _spoken(title: str, series: Sequence[Series], bold: Sequence[np.ndarray]) -> str:
    parts = []
    for line, y in zip(series, bold, strict=True):
        finite = y[np.isfinite(y)]
        parts.append(f"{line.name} from {short_number(float(finite[0]))} to {short_number(float(finite[-1]))}")
    return f"{title} over the steps of training: {'; '.join(parts)}"
