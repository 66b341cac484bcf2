"""Makes STEM images with exact answers: formulas, sums, bar charts and line charts, drawn by matplotlib."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from data_pipelines.emoji.seeded_rng import pick
from data_pipelines.emoji.splits import DRAWING_SHARE, unit_hash

DPI = 100
BAR_NAMES = ("A", "B", "C")
BAR_COLOURS = ("#d9534f", "#3f7fd1", "#4caf6d")


@dataclass(frozen=True)
class StemImage:
    """An image and the questions about it. `content` identifies it: equal content gives equal pixels."""

    content: str
    draw: Callable[[Figure], None]
    questions: tuple[tuple[str, str], ...]
    labels: dict[str, Any]

    @property
    def is_heldout(self) -> bool:
        """Depends on the content alone, so that no content is both in train and held out."""
        return unit_hash("stem", self.content) < DRAWING_SHARE


def make_stem(rng: np.random.Generator) -> StemImage:
    return pick(rng, (sum_of_two, formula, bar_chart_image, bar_chart_image, line_chart_image))(rng)


def with_all_values(stem: StemImage) -> StemImage:
    """A bar chart with a question for each of its values; any other image as it is."""
    if stem.labels["stem"] != "bars":
        return stem
    values = zip(BAR_NAMES, stem.labels["values"], strict=True)
    asked = tuple((f"What is the value of {name}?", str(value)) for name, value in values)
    return replace(stem, questions=stem.questions[:2] + asked)


def render_stem(stem: StemImage, side: int) -> Image.Image:
    """The image as RGB of side x side pixels."""
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the images
        figure = Figure(figsize=(side / DPI, side / DPI), dpi=DPI)
        stem.draw(figure)
        figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def sum_of_two(rng: np.random.Generator) -> StemImage:
    """`3+4=?`: what is the answer?"""
    first, second = (int(n) for n in rng.integers(1, 10, 2))
    sign = pick(rng, ("+", "-"))
    if sign == "-" and second > first:
        first, second = second, first
    result = first + second if sign == "+" else first - second
    text = f"{first}{sign}{second}"
    return StemImage(
        content=text,
        draw=draw_mathtext(f"{text}=?"),
        questions=(("What is the result?", str(result)), ("What is the formula?", f"{text}=?")),
        labels={"stem": "sum", "formula": text, "result": result},
    )


def formula(rng: np.random.Generator) -> StemImage:
    """A short formula: read it as LaTeX."""
    a, b = (int(n) for n in rng.integers(2, 10, 2))
    x = pick(rng, ("x", "y", "n"))
    latex = pick(rng, (rf"\frac{{{a}}}{{{b}}}", f"{x}^{a}", rf"\sqrt{{{a}}}", f"{a}{x}+{b}", f"{x}_{a}"))
    return StemImage(
        content=latex,
        draw=draw_mathtext(latex),
        questions=(("What is the formula?", latex),),
        labels={"stem": "formula", "formula": latex},
    )


def bar_chart_image(rng: np.random.Generator) -> StemImage:
    """Three bars of different heights: which is highest or lowest, and how high is one?"""
    values = [int(v) for v in rng.permutation(9)[:3] + 1]

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.06, 0.16, 0.88, 0.8))
        axes.bar(range(3), values, color=BAR_COLOURS, width=0.8)
        for x, value in enumerate(values):
            axes.text(x, value + 0.2, str(value), ha="center", va="bottom", fontsize=15, fontweight="bold")
        axes.set_xticks(range(3), BAR_NAMES, fontsize=14, fontweight="bold")
        axes.tick_params(length=0, pad=1)
        axes.set_yticks([])
        axes.set_ylim(0, 11.5)
        axes.spines[["left", "right", "top"]].set_visible(False)

    asked = pick(rng, range(3))
    return StemImage(
        content="bars " + " ".join(map(str, values)),
        draw=draw,
        questions=(
            ("Which bar is highest?", BAR_NAMES[values.index(max(values))]),
            ("Which bar is lowest?", BAR_NAMES[values.index(min(values))]),
            (f"What is the value of {BAR_NAMES[asked]}?", str(values[asked])),
        ),
        labels={"stem": "bars", "values": values},
    )


def line_chart_image(rng: np.random.Generator) -> StemImage:
    """A line through four points that rises or falls all the way."""
    values = sorted(int(v) for v in rng.permutation(9)[:4] + 1)
    trend = pick(rng, ("rising", "falling"))
    if trend == "falling":
        values.reverse()

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.1, 0.1, 0.84, 0.84))
        axes.plot(values, color=BAR_COLOURS[1], linewidth=4, marker="o", markersize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlim(-0.3, 3.3)
        axes.set_ylim(0, 10)
        axes.spines[["right", "top"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_linewidth(2)

    return StemImage(
        content="line " + " ".join(map(str, values)),
        draw=draw,
        questions=(("Is the line rising or falling?", trend),),
        labels={"stem": "line", "values": values},
    )


def draw_mathtext(latex: str) -> Callable[[Figure], None]:
    """A function that draws the formula in the middle of a figure, as large as fits."""

    def draw(figure: Figure) -> None:
        text = figure.text(0.5, 0.5, f"${latex}$", ha="center", va="center", fontsize=40)
        box = text.get_window_extent()
        room = 0.9 * figure.bbox.width / box.width, 0.7 * figure.bbox.height / box.height
        text.set_fontsize(40 * min(*room, 1.2))

    return draw
