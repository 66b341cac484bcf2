"""Pairs of scenes that differ in one thing, with the instruction for each direction.

Both directions share the two scenes, so a reverse instruction leads back to the very pixels it started from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.rng import pick
from data_pipelines.emoji.scenes import (
    BACKGROUNDS,
    BIG,
    CORNER,
    PLACED,
    WORDS,
    Layer,
    Scene,
    article,
    noun,
    where,
    words,
)

LAYOUTS = (("left", "right"), ("top", "bottom"), ("top", "bottom left", "bottom right"))


@dataclass(frozen=True)
class Edit:
    """`forward` turns `before` into `after`, `backward` turns it back; each has its kind."""

    before: Scene
    after: Scene
    forward: str
    backward: str
    kind: str
    back_kind: str


@dataclass(frozen=True)
class Pool:
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
        """A drawing in this style of none of these concepts; concepts with many skin tones come no more often."""
        free: dict[str, list[Drawing]] = {}
        for drawing in self.drawings:
            if drawing.style == style and drawing.concept not in concepts:
                free.setdefault(drawing.concept, []).append(drawing)
        return pick(rng, pick(rng, list(free.values()))) if free else None


def lone_scene(rng: np.random.Generator, drawing: Drawing) -> Scene:
    """One drawing, mostly big in the centre."""
    background = pick(rng, list(BACKGROUNDS))
    place = pick(rng, ("centre", "centre", "left", "right", "top", "bottom"))
    return Scene(background, (Layer(drawing, place, pick(rng, BIG) if place == "centre" else PLACED),))


def layered_scene(rng: np.random.Generator, lead: Drawing, pool: Pool, count: int) -> Scene | None:
    """`count` drawings of different concepts in the lead's style, the lead among them; None if the pool lacks them."""
    shown = [lead]
    while len(shown) < count:
        other = pool.another(rng, lead.style, {d.concept for d in shown})
        if other is None:
            return None
        shown.append(other)
    layout = pick(rng, [names for names in LAYOUTS if len(names) >= count])
    places = [layout[int(i)] for i in sorted(rng.permutation(len(layout))[:count])]
    order = rng.permutation(count)
    layers = tuple(Layer(shown[int(i)], place, CORNER) for i, place in zip(order, places, strict=True))
    return Scene(pick(rng, list(BACKGROUNDS)), layers)


def any_scene(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Scene:
    """A lone drawing, or now and then two."""
    scene = layered_scene(rng, lead, pool, 2) if rng.random() < 0.25 else None
    return scene or lone_scene(rng, lead)


def turned(rng: np.random.Generator, edit: Edit) -> Edit:
    """The edit, or its reverse as often, so that neither image of a record is always the richer one."""
    if rng.random() < 0.5:
        return edit
    return Edit(edit.after, edit.before, edit.backward, edit.forward, edit.back_kind, edit.kind)


def edit_add(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    """Add a drawing; the reverse removes it."""
    scene = layered_scene(rng, lead, pool, pick(rng, (2, 2, 3)))
    if scene is None:
        return None
    gone = int(rng.integers(len(scene.layers)))
    layer = scene.layers[gone]
    fewer = replace(scene, layers=scene.layers[:gone] + scene.layers[gone + 1 :])
    name = noun(layer.drawing)
    return Edit(fewer, scene, f"add {article(name)} {where(layer.place)}", f"remove the {name}", "add", "remove")


def edit_replace(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    """Swap the lead for another concept in the same style, place and size."""
    scene = any_scene(rng, lead, pool)
    new = pool.another(rng, lead.style, {d.concept for d in scene.drawings})
    if new is None:
        return None
    return swap(scene, lead, new, "replace", lambda old, now: f"replace the {noun(old)} with {article(noun(now))}")


def edit_recolour(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    """Another skin tone of the same drawing."""
    tones = pool.siblings(lead, "tone")
    if not tones:
        return None

    def instruction(_: Drawing, now: Drawing) -> str:
        skin = "yellow" if now.tone == "default" else words(now.tone or "")
        return f"give the {now.concept} {skin} skin"

    return swap(any_scene(rng, lead, pool), lead, pick(rng, tones), "recolour", instruction)


def edit_style(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    """The same lone drawing in another style, at the same place on the same background."""
    styles = pool.siblings(lead, "style")
    if not styles:
        return None
    return swap(lone_scene(rng, lead), lead, pick(rng, styles), "style", lambda _, now: f"make it {words(now.style)}")


def edit_background(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    scene = any_scene(rng, lead, pool)
    colour = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    return Edit(
        scene,
        replace(scene, background=colour),
        f"make the background {colour}",
        f"make the background {scene.background}",
        "background",
        "background",
    )


def edit_text(rng: np.random.Generator, lead: Drawing, pool: Pool) -> Edit | None:
    """Write a word (the reverse removes it), or change one word for another."""
    bare = Scene(pick(rng, list(BACKGROUNDS)), (Layer(lead, "top", PLACED),))
    word = pick(rng, WORDS)
    written = replace(bare, word=word)
    if rng.random() < 0.5:
        return Edit(bare, written, f"write {word}", "remove the word", "text", "text")
    other = pick(rng, [w for w in WORDS if w != word])
    changed = replace(bare, word=other)
    return Edit(written, changed, f"change the word to {other}", f"change the word to {word}", "text", "text")


def swap(scene: Scene, old: Drawing, new: Drawing, kind: str, instruction: Callable[[Drawing, Drawing], str]) -> Edit:
    layers = tuple(replace(layer, drawing=new) if layer.drawing == old else layer for layer in scene.layers)
    return Edit(scene, replace(scene, layers=layers), instruction(old, new), instruction(new, old), kind, kind)


EDITS: dict[str, Callable[[np.random.Generator, Drawing, Pool], Edit | None]] = {
    "add": edit_add,
    "replace": edit_replace,
    "recolour": edit_recolour,
    "style": edit_style,
    "background": edit_background,
    "text": edit_text,
}


def make_edit(rng: np.random.Generator, kind: str, lead: Drawing, pool: Pool) -> Edit:
    """An edit of this kind that shows `lead`; where the pool cannot furnish it (no other tone, say), another kind."""
    fallbacks = [name for name in ("style", "replace", "background") if name != kind]
    for name in (kind, *fallbacks):
        edit = EDITS[name](rng, lead, pool)
        if edit is not None:
            return turned(rng, edit)
    raise AssertionError("a background edit is always possible")
