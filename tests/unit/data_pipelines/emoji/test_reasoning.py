"""Answers in steps: what is said before the answer is true, and the same questions have the same answers in the end."""

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.emoji.drawings import Catalogue, Drawing
from data_pipelines.emoji.prompts import Prompt
from data_pipelines.emoji.reasoning import scene_observation, stem_observation
from data_pipelines.emoji.records import RecordMaker
from data_pipelines.emoji.scenes import Layer, Scene
from data_pipelines.emoji.seeded_rng import seeded_generator
from data_pipelines.emoji.stem import bar_chart_image, formula, line_chart_image, sum_of_two
from emma_train.sequence.answers import final_answer

GHOST = Drawing("ghost", "flat", None, "Smileys & Emotion", Path("ghost.svg"))
PIZZA = Drawing("pizza", "flat", None, "Food & Drink", Path("pizza.svg"))
PAIR = Scene("blue", (Layer(GHOST, "left"), Layer(PIZZA, "right")))


def test_what_is_said_first() -> None:
    assert scene_observation(PAIR, "count") == "ghost, pizza"
    assert scene_observation(Scene("blue", (Layer(GHOST),)), "group") == "ghost"
    assert scene_observation(PAIR, "background") == ""
    bars = {"stem": "bars", "values": [3, 7, 5]}
    assert stem_observation(bars, "Which bar is highest?") == "A 3, B 7, C 5"
    assert stem_observation(bars, "What is the value of B?") == ""
    total = {"stem": "sum", "formula": "3+2", "result": 5}
    assert stem_observation(total, "What is the result?") == "3+2=5"
    assert stem_observation(total, "What is the formula?") == ""
    assert stem_observation({"stem": "line", "values": [1, 2, 4, 9]}, "Is the line rising or falling?") == "1, 2, 4, 9"
    assert stem_observation({"stem": "formula", "formula": "x^2"}, "What is the formula?") == ""


@pytest.mark.parametrize("make", [sum_of_two, formula, bar_chart_image, line_chart_image])
def test_a_set_differs_in_its_answers_alone(make: object, catalogue: Catalogue) -> None:
    direct, steps = (RecordMaker(32, "1", 2, True, in_steps=in_steps) for in_steps in (False, True))
    assert callable(make)
    stem = make(np.random.default_rng(4))
    scene = Scene("blue", tuple(Layer(d, p, 0.46) for d, p in zip(catalogue.drawings, ("left", "right"), strict=False)))
    prompt = Prompt("two", scene, "two things")
    for one, other in (
        (direct.stem(stem), steps.stem(stem)),
        *((m.prompt(seeded_generator(0, "a"), prompt, catalogue.drawings[0]) for m in (direct, steps)),),
    ):
        assert one[1]["img0"].tobytes() == other[1]["img0"].tobytes()
        answers = [[a["turns"][-1]["text"] for a in record["i2t"]] for record, _ in (one, other)]
        assert [final_answer(text) for text in answers[1]] == answers[0]
        questions = [[a["turns"][:-1] for a in record["i2t"]] for record, _ in (one, other)]
        assert questions[0] == questions[1]
        assert {k: v for k, v in one[0].items() if k != "i2t"} == {k: v for k, v in other[0].items() if k != "i2t"}
    assert any(" Answer: " in text for text in answers[1])


def test_the_last_part_is_the_answer() -> None:
    assert final_answer("A 3, B 7. Answer: B ") == "B" == final_answer(" B") == final_answer("Answer: A. Answer: B")
    assert final_answer("A 3, B 7") == "A 3, B 7"
