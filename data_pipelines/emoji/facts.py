"""What a prompt or an edit asks of an image, as facts that are right or wrong in the scene read back from it."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from data_pipelines.emoji.checker import Reading
from data_pipelines.emoji.drawings import Drawing
from data_pipelines.emoji.scenes import BIG_SIZES, OFF_CENTRE_SIZE, POSITIONS, SMALL_SIZE, Layer, Scene

SIZES = {"small": SMALL_SIZE, "medium": OFF_CENTRE_SIZE, "big": BIG_SIZES[1]}
UNSTATED = {"two": {"position"}, "counting": {"position"}, "binding": {"position"}, "text": {"position"}}
"""Kind of prompt -> facts that it leaves open."""
RELATED = 0.2
"""Two drawings are beside (above) each other if their centres differ at least by this share of the image's side."""


class SceneLabels:
    """The scenes that the labels of records describe."""

    def __init__(self, drawings: Iterable[Drawing]) -> None:
        self.by_id = {drawing.id: drawing for drawing in drawings}
        self.by_looks = {(d.concept, d.style, d.tone): d for d in self.by_id.values()}

    def scene(self, labels: Mapping[str, Any], image: str) -> Scene | None:
        """The scene of an image of a record; None if the labels do not describe it, or show an unknown drawing."""
        try:
            if image in labels.get("scenes", {}):
                truth = labels["scenes"][image]
                layers = tuple(Layer(self.by_id[name], position) for name, position in truth["layers"])
                return Scene(truth["background"], layers, truth.get("word"))
            drawing = self.by_looks[labels["concepts"][0], labels["style"], labels.get("tone")]
            return Scene(labels["background"], (Layer(drawing, labels["place"], SIZES[labels["size"]]),))
        except (KeyError, IndexError):
            return None


def prompt_kind(kind: str, wanted: Scene) -> str:
    """The kind of a prompt: as its record says, else by its scene."""
    return kind or ("single" if wanted.is_single else "scene")


def judge_prompt(kind: str, wanted: Scene, reading: Reading) -> dict[str, bool]:
    """Fact -> whether it is right, of the facts that a prompt for the scene states; `all`: every one of them is.

    Nothing but the background is right in an image that cannot be read. `kind` is that of the prompt; a kind `position`
    states where drawings are to each other, other kinds at which positions they are.
    """
    shown = reading.scene
    right = {
        "object": _includes(shown.drawings, wanted.drawings, lambda d: d.concept),
        "count": len(shown.layers) == len(wanted.layers),
        "background": shown.background == wanted.background,
        "style": _equal(shown.drawings, wanted.drawings, lambda d: d.style),
    }
    if any(drawing.tone for drawing in wanted.drawings):
        right["tone"] = _equal(shown.drawings, wanted.drawings, lambda d: d.tone)
    if len(wanted.layers) > 1:
        right["binding"] = _equal(shown.drawings, wanted.drawings, lambda d: (d.concept, d.style, d.tone))
    if kind == "position":
        right["position"] = _relations(wanted) <= _relations(shown)
    else:
        right["position"] = _equal(shown.layers, wanted.layers, lambda layer: (layer.position, layer.is_small))
    if wanted.word:
        right["word"] = shown.word == wanted.word
    stated = {fact: value for fact, value in right.items() if fact not in UNSTATED.get(kind, set())}
    if not reading.is_readable:
        stated = {fact: value and fact == "background" for fact, value in stated.items()}
    return {**stated, "all": reading.is_readable and all(stated.values())}


def judge_edit(source: Scene, target: Scene, reading: Reading) -> dict[str, bool]:
    """`done`: what the edit changes reads as in the target. `kept`: all else reads as in the source. `both`: both."""
    before, after, shown = (scene_facts(scene) for scene in (source, target, reading.scene))
    done = after - before <= shown and not (before - after) & shown
    kept = before & after <= shown and _positions(shown) <= _positions(before | after)
    right = {"done": done, "kept": kept, "both": done and kept}
    return right if reading.is_readable else dict.fromkeys(right, False)


SceneFact = tuple[str, ...]


def scene_facts(scene: Scene) -> frozenset[SceneFact]:
    """Background, word, and for each position concept, style and tone."""
    facts: set[SceneFact] = {("background", scene.background), ("word", scene.word or "")}
    for layer in scene.layers:
        drawing = layer.drawing
        values = {"concept": drawing.concept, "style": drawing.style, "tone": drawing.tone or ""}
        facts |= {(name, value, layer.position) for name, value in values.items()}
    return frozenset(facts)


def _positions(facts: frozenset[SceneFact]) -> set[str]:
    return {fact[2] for fact in facts if fact[0] == "concept"}


def _relations(scene: Scene) -> set[SceneFact]:
    """Which concept is left of or above which."""
    relations: set[SceneFact] = set()
    for first in scene.layers:
        for second in scene.layers:
            (x, y), (other_x, other_y) = POSITIONS[first.position], POSITIONS[second.position]
            names = first.drawing.concept, second.drawing.concept
            relations |= {("left", *names)} if other_x - x >= RELATED else set()
            relations |= {("above", *names)} if other_y - y >= RELATED else set()
    return relations


def _equal(shown: Iterable[Any], wanted: Iterable[Any], of: Any) -> bool:
    return _counts(shown, of) == _counts(wanted, of)


def _includes(shown: Iterable[Any], wanted: Iterable[Any], of: Any) -> bool:
    return _counts(wanted, of) <= _counts(shown, of)


def _counts(values: Iterable[Any], of: Any) -> Counter[Hashable]:
    return Counter(of(value) for value in values)
