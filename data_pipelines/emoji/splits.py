"""Which drawings a model never sees. A pure function of names: no file order, seed or set size moves a drawing.

`heldout_concepts`: no drawing of the concept is in train. `heldout_drawings`: the concept is known from other styles or
skin tones, this drawing is not. An image belongs to the split of its least-known drawing.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from data_pipelines.emoji.drawings import Drawing

TRAIN = "train"
HELDOUT_DRAWINGS = "heldout_drawings"
HELDOUT_CONCEPTS = "heldout_concepts"
SPLITS = (TRAIN, HELDOUT_DRAWINGS, HELDOUT_CONCEPTS)

CONCEPT_SHARE = 0.08
DRAWING_SHARE = 0.12
SALT = "emma-178"
"""Fixed for ever; chosen so that five concepts of the tiny world, from five groups, are held out."""


def unit_hash(kind: str, name: str) -> float:
    """A number in [0, 1) that is a function of the name alone."""
    digest = hashlib.sha256(f"{SALT}/{kind}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_heldout_concept(concept: str) -> bool:
    return unit_hash("concept", concept) < CONCEPT_SHARE


def drawing_hash(drawing: Drawing) -> float:
    return unit_hash("drawing", f"{drawing.concept}/{drawing.style}/{drawing.tone or ''}")


def split_drawings(drawings: Iterable[Drawing]) -> dict[Drawing, str]:
    """Drawing -> split. Each concept that is not held out keeps at least one drawing in train."""
    by_concept: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        by_concept[drawing.concept].append(drawing)
    split: dict[Drawing, str] = {}
    for concept, members in by_concept.items():
        if is_heldout_concept(concept):
            split.update(dict.fromkeys(members, HELDOUT_CONCEPTS))
            continue
        keeper = max(members, key=drawing_hash)
        for drawing in members:
            held = drawing_hash(drawing) < DRAWING_SHARE and drawing != keeper
            split[drawing] = HELDOUT_DRAWINGS if held else TRAIN
    return split


def image_split(shown: Iterable[Drawing], split: Mapping[Drawing, str]) -> str:
    """The split of an image (or a pair) that shows these drawings."""
    return max((split[drawing] for drawing in shown), key=SPLITS.index, default=TRAIN)


def allowed(drawings: Iterable[Drawing], split: Mapping[Drawing, str], name: str) -> list[Drawing]:
    """What an image of the split `name` may show: its own drawings and, beside them, those of the splits before it.

    Images of `heldout_drawings` thus show seen concepts only.
    """
    return [d for d in drawings if SPLITS.index(split[d]) <= SPLITS.index(name)]
