"""Questions about an image whose answers are known because the image was made from them."""

from typing import Any

import numpy as np

from data_pipelines.emoji.rng import pick
from data_pipelines.emoji.scenes import Scene, words

PHRASINGS: dict[str, tuple[str, ...]] = {
    "concept": ("What is this?", "What does it show?", "Name the drawing."),
    "style": ("Which style?", "Which style is this?"),
    "group": ("Which group?", "Which group is this?"),
    "background": ("Which background?", "What colour is the background?"),
    "place": ("Where is it?", "Where is the drawing?"),
    "word": ("Which word?", "What does the word say?"),
}


def answers(scene: Scene) -> dict[str, str]:
    """Kind of question -> answer. Scenes of several drawings have answers only about what they share."""
    known = {"background": scene.background}
    if scene.word:
        known["word"] = scene.word
    if len({d.style for d in scene.drawings}) == 1:
        known["style"] = words(scene.drawings[0].style)
    if len(scene.layers) == 1:
        drawing = scene.drawings[0]
        known["concept"] = drawing.concept
        if drawing.group is not None:
            known["group"] = drawing.group.lower()
        known["place"] = scene.layers[0].place
    return known


def ask(rng: np.random.Generator, image: str, kind: str, answer: str) -> dict[str, Any]:
    """One i2t alternative of the record format, in one of the phrasings of its kind."""
    return i2t(image, pick(rng, PHRASINGS[kind]), answer, kind)


def i2t(image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"images": [image], "turns": turns, "kind": kind}
