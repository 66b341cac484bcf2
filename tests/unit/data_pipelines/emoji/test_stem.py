import numpy as np

from data_pipelines.emoji.seeded_rng import seeded_generator
from data_pipelines.emoji.stem import (
    StemImage,
    bar_chart_image,
    formula,
    line_chart_image,
    make_stem,
    render_stem,
    sum_of_two,
)


def counter_rng(maker, count: int = 40) -> list[StemImage]:  # type: ignore[no-untyped-def]
    return [maker(seeded_generator(0, str(i))) for i in range(count)]


def test_sums_are_right() -> None:
    for stem in counter_rng(sum_of_two):
        known_answers = dict(stem.questions)
        first, sign, second = stem.content[0], stem.content[1], stem.content[2]
        assert known_answers["What is the result?"] == str(int(first) + int(second) * (1 if sign == "+" else -1))
        assert known_answers["What is the formula?"] == stem.content + "=?"


def test_bar_answers_are_right() -> None:
    for stem in counter_rng(bar_chart_image):
        values = dict(zip("ABC", stem.labels["values"], strict=True))
        assert len(set(values.values())) == 3
        for question, answer in stem.questions:
            if "highest" in question:
                assert values[answer] == max(values.values())
            elif "lowest" in question:
                assert values[answer] == min(values.values())
            else:
                assert answer == str(values[question[-2]])


def test_line_answers_are_right() -> None:
    for stem in counter_rng(line_chart_image):
        steps = np.diff(stem.labels["values"])
        assert (steps > 0).all() if stem.questions[0][1] == "rising" else (steps < 0).all()


def test_formulas_stay_inside_the_image_and_use_it() -> None:
    for stem in [*counter_rng(formula, 8), *counter_rng(sum_of_two, 2)]:
        ink = np.asarray(render_stem(stem, 128).convert("L")) < 128
        assert not (ink[:2].any() or ink[-2:].any() or ink[:, :2].any() or ink[:, -2:].any())
        rows, columns = np.nonzero(ink)
        assert max(np.ptp(rows), np.ptp(columns)) > 0.3 * 128


def test_the_same_content_is_the_same_image_whatever_the_reader_configured() -> None:
    import matplotlib

    stem = make_stem(seeded_generator(0, "a"))
    plain = render_stem(stem, 64)
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30}):
        assert np.array_equal(plain, render_stem(stem, 64))


def test_about_an_eighth_of_contents_is_held_out() -> None:
    stems = {stem.content: stem.is_heldout for stem in counter_rng(make_stem, 1500)}
    assert 0.06 < sum(stems.values()) / len(stems) < 0.18
