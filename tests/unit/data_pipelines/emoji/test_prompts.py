"""Prompts for scenes of several drawings: captions say what is scored, and the scenes are scored as right."""

from collections import Counter

import pytest

from data_pipelines.emoji.build import PROMPT_KINDS
from data_pipelines.emoji.checker import Reading
from data_pipelines.emoji.drawing_sheet import read_sheet
from data_pipelines.emoji.edits import DrawingPool
from data_pipelines.emoji.facts import judge_prompt
from data_pipelines.emoji.prompts import Prompt, make_prompt
from data_pipelines.emoji.scenes import drawing_name
from data_pipelines.emoji.seeded_rng import pick, seeded_generator
from tests.scenes import EMOJI


def make(kind: str, number: int) -> Prompt:
    drawings = read_sheet(EMOJI).drawings
    rng = seeded_generator(3, f"{kind}/{number}")
    return make_prompt(rng, kind, pick(rng, drawings), DrawingPool(drawings))


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_a_prompt_describes_its_scene(kind: str) -> None:
    for number in range(8):
        prompt = make(kind, number)
        assert prompt.kind == kind
        assert judge_prompt(kind, prompt.scene, Reading(prompt.scene, 0.0))["all"]
        for drawing in prompt.scene.drawings:
            assert f"{drawing.style.replace('-', ' ')} {drawing_name(drawing)}" in prompt.text
        assert f"{prompt.scene.background} background" in prompt.text
        assert (prompt.scene.word is None) == (kind != "text")
        assert len(prompt.scene.layers) == {"text": 1, "scene": 3}.get(kind, len(prompt.scene.layers))
        if kind == "counting":
            count = {2: "two times", 3: "three times"}[len(prompt.scene.layers)]
            assert count in prompt.text and len(set(prompt.scene.drawings)) == 1
        if kind == "binding":
            assert len({d.style for d in prompt.scene.drawings}) == 2


def test_a_relation_in_words_is_that_of_the_scene() -> None:
    seen = Counter[str]()
    for number in range(24):
        prompt = make("position", number)
        first, second = prompt.scene.layers
        name, other = (f"{d.style.replace('-', ' ')} {drawing_name(d)}" for d in prompt.scene.drawings)
        relation = {"left": "left of", "top": "above"}[first.position]
        reverse = {"left": "right of", "top": "below"}[first.position]
        says_forward = f"{name} {relation} " in prompt.text and prompt.text.index(name) < prompt.text.index(relation)
        assert says_forward or f"{other} {reverse} " in prompt.text
        seen[relation if says_forward else reverse] += 1
    assert len(seen) == 4
