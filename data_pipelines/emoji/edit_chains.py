"""Edits one after another: an edit of a record, and others of the scene that it makes. Each changes something that the
ones before it did not, in the words that single edits have in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.edits import (
    DrawingPool,
    background_instruction,
    recolour_instruction,
    remove_instruction,
    replace_instruction,
    style_instruction,
    word_instruction,
)
from data_pipelines.emoji.facts import SceneLabels
from data_pipelines.emoji.scenes import BACKGROUNDS, WORDS, Layer, Scene
from data_pipelines.emoji.seeded_rng import pick, seeded_generator
from data_pipelines.emoji.splits import allowed_drawings, split_drawings
from emma_train.sequence.request import Request

FINAL = {"add": {"remove"}, "remove": {"remove"}}
"""Kind of an edit -> kinds that may not follow, beside itself: they could take its change back."""
NextEdit = tuple[str, str, Scene]
"""Kind, instruction, and the scene after it."""


@dataclass(frozen=True)
class EditChain:
    """The request of the first edit, the instructions of all, and the scenes: before, and wanted after each."""

    request: Request
    texts: tuple[str, ...]
    scenes: tuple[Scene, ...]


def edit_chains(
    drawings: Sequence[Drawing], split: str, requests: Sequence[Request], num_edits: int
) -> list[EditChain]:
    """Chains of `num_edits` that begin with the edits of the requests, of those whose scenes are known and that can be
    continued so far with drawings that the split may show."""
    labels, pool = SceneLabels(drawings), DrawingPool(allowed_drawings(drawings, split_drawings(drawings), split))
    chains = []
    for request in requests:
        scenes = [labels.scene(request.labels, name) for name in (*request.image_names, request.target_name)]
        if len(scenes) != 2 or scenes[0] is None or scenes[1] is None:
            continue
        chain = EditChain(request, (request.text,), (scenes[0], scenes[1]))
        rng, used = seeded_generator(0, f"{request.key}/chain"), {request.kind} | FINAL.get(request.kind, set())
        while len(chain.texts) < num_edits and (edits := list(next_edits(rng, *chain.scenes, pool=pool, used=used))):
            kind, text, scene = pick(rng, edits)
            used |= {kind} | FINAL.get(kind, set())
            chain = replace(chain, texts=(*chain.texts, text), scenes=(*chain.scenes, scene))
        if len(chain.texts) == num_edits:
            chains.append(chain)
    return chains


def next_edits(rng: np.random.Generator, *scenes: Scene, pool: DrawingPool, used: set[str]) -> Iterator[NextEdit]:
    """A random edit of the last scene of each kind that is not `used` and can be made. Drawings that an earlier edit
    changed are neither replaced nor removed."""
    scene = scenes[-1]
    possible = [layer for layer in scene.layers if layer in scenes[0].layers]
    if "background" not in used:
        colour = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        yield "background", background_instruction(colour), replace(scene, background=colour)
    if "replace" not in used and possible:
        layer = pick(rng, possible)
        new = pool.another(rng, layer.drawing.style, {d.concept for one in scenes for d in one.drawings})
        if new is not None:
            yield "replace", replace_instruction(layer.drawing, new), _with(scene, layer, new)
    if "remove" not in used and possible and len(scene.layers) > 1:
        layer = pick(rng, possible)
        rest = tuple(other for other in scene.layers if other != layer)
        yield "remove", remove_instruction(layer.drawing), replace(scene, layers=rest)
    if "recolour" not in used and (toned := [la for la in scene.layers if pool.siblings(la.drawing, "tone")]):
        layer = pick(rng, toned)
        new = pick(rng, pool.siblings(layer.drawing, "tone"))
        yield "recolour", recolour_instruction(layer.drawing, new), _with(scene, layer, new)
    if "style" not in used and scene.is_single and (styles := pool.siblings(scene.drawings[0], "style")):
        new = pick(rng, styles)
        yield "style", style_instruction(scene.drawings[0], new), _with(scene, scene.layers[0], new)
    if "text" not in used and scene.word:
        word = pick(rng, [word for word in WORDS if word != scene.word])
        yield "text", word_instruction(word), replace(scene, word=word)


def _with(scene: Scene, layer: Layer, new: Drawing) -> Scene:
    """The scene with another drawing in a layer."""
    layers = tuple(replace(one, drawing=new) if one == layer else one for one in scene.layers)
    return replace(scene, layers=layers)
