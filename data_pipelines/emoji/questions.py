"""Questions about a scene, with answers that are exact because the image was made from the scene."""

from typing import Any

import numpy as np

from data_pipelines.emoji.prompts import COUNT_WORDS
from data_pipelines.emoji.scenes import Scene, position_phrase, without_hyphens
from data_pipelines.emoji.seeded_rng import pick

PHRASINGS: dict[str, tuple[str, ...]] = {
    "concept": ("What is this?", "What does it show?", "Name the drawing."),
    "style": ("Which style?", "Which style is this?"),
    "group": ("Which group?", "Which group is this?"),
    "background": ("Which background?", "What colour is the background?"),
    "place": ("Where is it?", "Where is the drawing?"),
    "word": ("Which word?", "What does the word say?"),
}


def known_answers(scene: Scene) -> dict[str, str]:
    """Kind of question -> answer. A scene of several drawings only answers what is the same for all of them."""
    known = {"background": scene.background}
    if scene.word:
        known["word"] = scene.word
    if len({d.style for d in scene.drawings}) == 1:
        known["style"] = without_hyphens(scene.drawings[0].style)
    if len(scene.layers) == 1:
        drawing = scene.drawings[0]
        known["concept"] = drawing.concept
        if drawing.group is not None:
            known["group"] = drawing.group.lower()
        known["place"] = scene.layers[0].position
    return known


def scene_questions(rng: np.random.Generator, image: str, scene: Scene) -> list[dict[str, Any]]:
    """How many drawings there are, what is at one of their positions, and the word or the background."""
    layer = pick(rng, scene.layers)
    kind = "word" if scene.word else "background"
    return [
        question_alternative(image, "How many drawings?", COUNT_WORDS[len(scene.layers)], "count"),
        question_alternative(image, f"What is {position_phrase(layer.position)}?", layer.drawing.concept, "at"),
        make_question(rng, image, kind, known_answers(scene)[kind]),
    ]


def make_question(rng: np.random.Generator, image: str, kind: str, answer: str) -> dict[str, Any]:
    """An i2t alternative with a random phrasing of the question."""
    return question_alternative(image, pick(rng, PHRASINGS[kind]), answer, kind)


def question_alternative(image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    """An i2t alternative of the record format."""
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"images": [image], "turns": turns, "kind": kind}
