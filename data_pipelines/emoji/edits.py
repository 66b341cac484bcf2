"""Makes edits: two scenes that differ in one thing, with an instruction for each direction.

Both directions use the same two scenes, so the reverse instruction restores exactly the original pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.scenes import (
    BACKGROUNDS,
    BIG_SIZES,
    CORNER_SIZE,
    OFF_CENTRE_SIZE,
    WORDS,
    Layer,
    Scene,
    drawing_name,
    position_phrase,
    with_article,
    without_hyphens,
)
from data_pipelines.emoji.seeded_rng import pick

LAYOUTS = (("left", "right"), ("top", "bottom"), ("top", "bottom left", "bottom right"))


@dataclass(frozen=True)
class Edit:
    """Instruction `forward` (of `kind`) changes `before` into `after`; `backward` (of `back_kind`) changes it back."""

    before: Scene
    after: Scene
    forward: str
    backward: str
    kind: str
    back_kind: str


@dataclass(frozen=True)
class DrawingPool:
    """The drawings that the images of one split may show."""

    drawings: Sequence[Drawing]

    def siblings(self, drawing: Drawing, vary: str) -> list[Drawing]:
        """Drawings of the same concept that differ in `vary` (`style` or `tone`) alone."""
        fixed = "tone" if vary == "style" else "style"
        return [
            d
            for d in self.drawings
            if d.concept == drawing.concept
            and getattr(d, fixed) == getattr(drawing, fixed)
            and getattr(d, vary) != getattr(drawing, vary)
        ]

    def another(self, rng: np.random.Generator, style: str, concepts: set[str]) -> Drawing | None:
        """A random drawing in this style of another concept. All concepts are equally likely, with or without tones."""
        free: dict[str, list[Drawing]] = {}
        for drawing in self.drawings:
            if drawing.style == style and drawing.concept not in concepts:
                free.setdefault(drawing.concept, []).append(drawing)
        return pick(rng, pick(rng, list(free.values()))) if free else None


def lone_scene(rng: np.random.Generator, drawing: Drawing) -> Scene:
    """One drawing: often big in the centre."""
    background = pick(rng, list(BACKGROUNDS))
    position = pick(rng, ("centre", "centre", "left", "right", "top", "bottom"))
    return Scene(
        background, (Layer(drawing, position, pick(rng, BIG_SIZES) if position == "centre" else OFF_CENTRE_SIZE),)
    )


def layered_scene(rng: np.random.Generator, lead: Drawing, pool: DrawingPool, count: int) -> Scene | None:
    """The lead and others of different concepts in its style, `count` in all; None if the pool has too few."""
    shown = [lead]
    while len(shown) < count:
        other = pool.another(rng, lead.style, {d.concept for d in shown})
        if other is None:
            return None
        shown.append(other)
    layout = pick(rng, [names for names in LAYOUTS if len(names) >= count])
    places = [layout[int(i)] for i in sorted(rng.permutation(len(layout))[:count])]
    order = rng.permutation(count)
    layers = tuple(Layer(shown[int(i)], position, CORNER_SIZE) for i, position in zip(order, places, strict=True))
    return Scene(pick(rng, list(BACKGROUNDS)), layers)


def any_scene(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Scene:
    """One drawing, or two in a quarter of the cases."""
    scene = layered_scene(rng, lead, pool, 2) if rng.random() < 0.25 else None
    return scene or lone_scene(rng, lead)


def randomly_reversed(rng: np.random.Generator, edit: Edit) -> Edit:
    """The edit or its reverse, with equal probability, so that neither image of a record always shows more."""
    if rng.random() < 0.5:
        return edit
    return Edit(edit.after, edit.before, edit.backward, edit.forward, edit.back_kind, edit.kind)


def edit_add(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    """Add a drawing; the reverse removes it."""
    scene = layered_scene(rng, lead, pool, pick(rng, (2, 2, 3)))
    if scene is None:
        return None
    gone = int(rng.integers(len(scene.layers)))
    layer = scene.layers[gone]
    fewer = replace(scene, layers=scene.layers[:gone] + scene.layers[gone + 1 :])
    name = drawing_name(layer.drawing)
    return Edit(
        fewer,
        scene,
        f"add {with_article(name)} {position_phrase(layer.position)}",
        remove_instruction(layer.drawing),
        "add",
        "remove",
    )


def edit_replace(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    """Replace the lead by another concept in the same style, position and size."""
    scene = any_scene(rng, lead, pool)
    new = pool.another(rng, lead.style, {d.concept for d in scene.drawings})
    if new is None:
        return None
    return swap(scene, lead, new, "replace", replace_instruction)


def edit_recolour(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    """Another skin tone of the same drawing."""
    tones = pool.siblings(lead, "tone")
    if not tones:
        return None
    return swap(any_scene(rng, lead, pool), lead, pick(rng, tones), "recolour", recolour_instruction)


def edit_style(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    """The same single drawing in another style, at the same position on the same background."""
    styles = pool.siblings(lead, "style")
    if not styles:
        return None
    return swap(lone_scene(rng, lead), lead, pick(rng, styles), "style", style_instruction)


def edit_background(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    scene = any_scene(rng, lead, pool)
    colour = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    return Edit(
        scene,
        replace(scene, background=colour),
        background_instruction(colour),
        background_instruction(scene.background),
        "background",
        "background",
    )


def edit_text(rng: np.random.Generator, lead: Drawing, pool: DrawingPool) -> Edit | None:
    """Write a word (the reverse removes it), or change one word for another."""
    bare = Scene(pick(rng, list(BACKGROUNDS)), (Layer(lead, "top", OFF_CENTRE_SIZE),))
    word = pick(rng, WORDS)
    written = replace(bare, word=word)
    if rng.random() < 0.5:
        return Edit(bare, written, f"write {word}", "remove the word", "text", "text")
    other = pick(rng, [w for w in WORDS if w != word])
    changed = replace(bare, word=other)
    return Edit(written, changed, word_instruction(other), word_instruction(word), "text", "text")


def swap(scene: Scene, old: Drawing, new: Drawing, kind: str, instruction: Callable[[Drawing, Drawing], str]) -> Edit:
    layers = tuple(replace(layer, drawing=new) if layer.drawing == old else layer for layer in scene.layers)
    return Edit(scene, replace(scene, layers=layers), instruction(old, new), instruction(new, old), kind, kind)


def remove_instruction(drawing: Drawing) -> str:
    return f"remove the {drawing_name(drawing)}"


def replace_instruction(old: Drawing, new: Drawing) -> str:
    return f"replace the {drawing_name(old)} with {with_article(drawing_name(new))}"


def recolour_instruction(_: Drawing, new: Drawing) -> str:
    skin = "yellow" if new.tone == "default" else without_hyphens(new.tone or "")
    return f"give the {new.concept} {skin} skin"


def style_instruction(_: Drawing, new: Drawing) -> str:
    return f"make it {without_hyphens(new.style)}"


def background_instruction(colour: str) -> str:
    return f"make the background {colour}"


def word_instruction(word: str) -> str:
    return f"change the word to {word}"


EDITS: dict[str, Callable[[np.random.Generator, Drawing, DrawingPool], Edit | None]] = {
    "add": edit_add,
    "replace": edit_replace,
    "recolour": edit_recolour,
    "style": edit_style,
    "background": edit_background,
    "text": edit_text,
}


def make_edit(rng: np.random.Generator, kind: str, lead: Drawing, pool: DrawingPool) -> Edit:
    """An edit of this kind that shows `lead`; of another kind if the pool has no drawing for it (another tone, say)."""
    fallbacks = [name for name in ("style", "replace", "background") if name != kind]
    for name in (kind, *fallbacks):
        edit = EDITS[name](rng, lead, pool)
        if edit is not None:
            return randomly_reversed(rng, edit)
    raise AssertionError("a background edit is always possible")
