import numpy as np
import pytest

from data_pipelines.emoji.drawings import Catalogue, Drawing
from data_pipelines.emoji.questions import known_answers
from data_pipelines.emoji.scenes import (
    BACKGROUNDS,
    OFF_CENTRE_SIZE,
    SMALL_SIZE,
    Layer,
    Scene,
    captions,
    render_scene,
    with_article,
)

SIDE = 64


def named(catalogue: Catalogue, name: str) -> Drawing:
    return next(d for d in catalogue.drawings if d.id == name)


def test_captions_say_style_concept_background_and_place(catalogue: Catalogue) -> None:
    scene = Scene("blue", (Layer(named(catalogue, "flat/red-circle"), "left", OFF_CENTRE_SIZE),))
    assert captions(scene) == [
        "a flat red circle on a blue background, on the left",
        "red circle, flat style, blue background, left",
        "a blue background with a flat red circle on the left",
    ]


def test_captions_say_skin_and_size(catalogue: Catalogue) -> None:
    scene = Scene("orange", (Layer(named(catalogue, "modern/waving-hand-dark"), "centre", SMALL_SIZE),))
    assert captions(scene) == [
        "a small modern waving hand with dark skin on an orange background",
        "waving hand, dark skin, modern style, orange background, small",
        "an orange background with a small modern waving hand with dark skin",
    ]


def test_a_layered_caption_names_every_drawing_and_the_word(catalogue: Catalogue) -> None:
    layers = (
        Layer(named(catalogue, "flat/red-circle"), "left", 0.4),
        Layer(named(catalogue, "flat/green-box"), "bottom right", 0.4),
    )
    assert captions(Scene("pink", layers, "HI")) == [
        "a flat red circle on the left and a flat green box at the bottom right, on a pink background, with the word HI"
    ]


def test_answers_are_what_the_image_was_made_from(catalogue: Catalogue) -> None:
    scene = Scene("grey", (Layer(named(catalogue, "high-contrast/blue-fish"), "top", OFF_CENTRE_SIZE),))
    assert known_answers(scene) == {
        "background": "grey",
        "style": "high contrast",
        "concept": "blue fish",
        "group": "animals & nature",
        "place": "top",
    }
    nameless = Scene("grey", (Layer(named(catalogue, "flat/nameless-thing")),))
    assert "group" not in known_answers(nameless)


@pytest.mark.parametrize(
    ("position", "row", "column"),
    [("left", 0.5, 0.28), ("right", 0.5, 0.72), ("top", 0.28, 0.5), ("bottom", 0.72, 0.5), ("centre", 0.5, 0.5)],
)
def test_the_drawing_is_where_the_caption_says(catalogue: Catalogue, position: str, row: float, column: float) -> None:
    scene = Scene("white", (Layer(named(catalogue, "flat/red-circle"), position, OFF_CENTRE_SIZE),))
    pixels = np.asarray(render_scene(scene, SIDE)).astype(int)
    painted = np.argwhere((pixels != BACKGROUNDS["white"]).any(-1)) / SIDE
    assert np.allclose(painted.mean(0), (row, column), atol=0.03)


def test_a_word_is_painted_at_the_bottom_only(catalogue: Catalogue) -> None:
    bare = Scene("green", (Layer(named(catalogue, "flat/red-circle"), "top", OFF_CENTRE_SIZE),))
    written = Scene("green", bare.layers, "WOW")
    changed = (np.asarray(render_scene(bare, SIDE)) != np.asarray(render_scene(written, SIDE))).any(-1)
    assert changed.any()
    assert not changed[: int(SIDE * 0.7)].any()


def test_article() -> None:
    assert (with_article("orange"), with_article("flat pizza")) == ("an orange", "a flat pizza")
