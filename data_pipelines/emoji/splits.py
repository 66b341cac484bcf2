"""Decides which drawings are held out. Depends on their names alone, not on file order, seed or size of the set.

`heldout_concepts`: no drawing of the concept is in train. `heldout_drawings`: the concept is known from other styles or
skin tones, this drawing is not. An image belongs to the last split, in the order of SPLITS, that one of its drawings
belongs to.
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
"""Must never change: the splits depend on it. It holds out five concepts of the tiny world, from five groups."""


def unit_hash(kind: str, name: str) -> float:
    """A number in [0, 1) that depends on kind and name alone."""
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
            is_heldout = drawing_hash(drawing) < DRAWING_SHARE and drawing != keeper
            split[drawing] = HELDOUT_DRAWINGS if is_heldout else TRAIN
    return split


def allowed_drawings(drawings: Iterable[Drawing], split: Mapping[Drawing, str], name: str) -> list[Drawing]:
    """The drawings that an image of the split `name` may show: those of this split and of the splits before it.

    So images of `heldout_drawings` only show concepts that also occur in train.
    """
    return [d for d in drawings if SPLITS.index(split[d]) <= SPLITS.index(name)]
