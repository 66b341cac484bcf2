"""Prompts for scenes of several drawings, each of a kind: two objects, counting, position, binding, text, scene.

Kinds are those of GenEval, as far as the world has them. What a prompt leaves open is in `UNSTATED` of facts.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.edits import LAYOUTS, DrawingPool, layered_scene
from data_pipelines.emoji.scenes import (
    BACKGROUNDS,
    CORNER_SIZE,
    OFF_CENTRE_SIZE,
    WORDS,
    Layer,
    Scene,
    drawing_name,
    layered_caption,
    with_article,
    without_hyphens,
)
from data_pipelines.emoji.seeded_rng import pick

COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
RELATIONS = {"left": ("left of", "right of"), "top": ("above", "below")}
"""Position of the first drawing -> (relation of the first to the second, relation of the second to the first)."""


@dataclass(frozen=True)
class Prompt:
    """A caption of a scene, and its kind."""

    kind: str
    scene: Scene
    text: str


def prompt_two(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt | None:
    """Two drawings in one style."""
    scene = layered_scene(rng, lead, pool, 2)
    return Prompt("two", scene, _joined(scene)) if scene else None


def prompt_counting(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt:
    """The same drawing two or three times."""
    count = pick(rng, (2, 3))
    scene = _arranged(rng, [lead] * count)
    return Prompt("counting", scene, f"{_named(lead)}, {COUNT_WORDS[count]} times, {_ground(scene)}")


def prompt_position(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt | None:
    """Two drawings, one beside or above the other."""
    other = pool.another(rng, lead.style, {lead.concept})
    if other is None:
        return None
    pair = [lead, other] if rng.random() < 0.5 else [other, lead]
    scene = _arranged(rng, pair, LAYOUTS[:2])
    relation, reverse = RELATIONS[scene.layers[0].position]
    first, second = (_named(drawing) for drawing in scene.drawings)
    text = f"{first} {relation} {second}" if rng.random() < 0.5 else f"{second} {reverse} {first}"
    return Prompt("position", scene, f"{text} {_ground(scene)}")


def prompt_binding(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt | None:
    """Two drawings of different concepts and styles."""
    others = [pool.another(rng, style, {lead.concept}) for style in ("flat", "modern", "high-contrast")]
    unlike = [drawing for drawing in others if drawing is not None and drawing.style != lead.style]
    if not unlike:
        return None
    scene = _arranged(rng, [lead, pick(rng, unlike)])
    return Prompt("binding", scene, _joined(scene))


def prompt_text(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt:
    """A drawing above a word."""
    scene = Scene(pick(rng, list(BACKGROUNDS)), (Layer(lead, "top", OFF_CENTRE_SIZE),), pick(rng, WORDS))
    return Prompt("text", scene, f"{_named(lead)} with the word {scene.word} {_ground(scene)}")


def prompt_scene(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Prompt | None:
    """Three drawings and where they are."""
    scene = layered_scene(rng, lead, pool, 3)
    return Prompt("scene", scene, layered_caption(scene)) if scene else None


PROMPT_MAKERS: dict[str, Callable[[np.random.Generator, Drawing, DrawingPool], Prompt | None]] = {
    "two": prompt_two,
    "counting": prompt_counting,
    "position": prompt_position,
    "binding": prompt_binding,
    "text": prompt_text,
    "scene": prompt_scene,
}


def make_prompt(rng: np.random.Generator, kind: str, lead: Drawing, pool: DrawingPool) -> Prompt:
    """A prompt of this kind that shows `lead`; for the same drawing several times if the pool has no other."""
    return PROMPT_MAKERS[kind](rng, lead, pool) or prompt_counting(rng, lead, pool)


def _arranged(
    rng: np.random.Generator, drawings: Sequence[Drawing], layouts: Sequence[tuple[str, ...]] = LAYOUTS
) -> Scene:
    """The drawings in the order of the positions of a random layout that has room for them."""
    layout = pick(rng, [names for names in layouts if len(names) >= len(drawings)])
    positions = [layout[int(i)] for i in sorted(rng.permutation(len(layout))[: len(drawings)])]
    layers = tuple(Layer(drawing, position, CORNER_SIZE) for drawing, position in zip(drawings, positions, strict=True))
    return Scene(pick(rng, list(BACKGROUNDS)), layers)


def _joined(scene: Scene) -> str:
    return f"{' and '.join(_named(drawing) for drawing in scene.drawings)} {_ground(scene)}"


def _named(drawing: Drawing) -> str:
    return with_article(f"{without_hyphens(drawing.style)} {drawing_name(drawing)}")


def _ground(scene: Scene) -> str:
    return f"on {with_article(scene.background)} background"
