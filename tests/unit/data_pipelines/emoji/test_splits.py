from pathlib import Path

import pytest

from data_pipelines.emoji.concepts import TINY_CONCEPTS
from data_pipelines.emoji.drawings import Catalogue, Drawing
from data_pipelines.emoji.splits import (
    HELDOUT_CONCEPTS,
    HELDOUT_DRAWINGS,
    TRAIN,
    allowed_drawings,
    is_heldout_concept,
    split_drawings,
)

MANY = [
    Drawing(f"concept {i}", style, None, "Objects", Path(f"{style}/concept-{i}.svg"))
    for i in range(1500)
    for style in ("flat", "modern", "high-contrast")
]


def test_shares_are_near_8_and_12_per_cent() -> None:
    split = split_drawings(MANY)
    concepts = {d.concept for d, name in split.items() if name == HELDOUT_CONCEPTS}
    assert 0.06 < len(concepts) / 1500 < 0.10
    seen = [name for name in split.values() if name != HELDOUT_CONCEPTS]
    assert 0.10 < seen.count(HELDOUT_DRAWINGS) / len(seen) < 0.14


def test_concepts_are_wholly_held_out_or_keep_a_drawing_in_train() -> None:
    split = split_drawings(MANY)
    for concept in {d.concept for d in MANY}:
        names = {name for d, name in split.items() if d.concept == concept}
        assert names == {HELDOUT_CONCEPTS} if is_heldout_concept(concept) else TRAIN in names


def test_a_lone_drawing_of_a_seen_concept_is_never_held_out() -> None:
    lone = [d for d in MANY if d.style == "flat" and not is_heldout_concept(d.concept)]
    assert set(split_drawings(lone).values()) == {TRAIN}


def test_order_and_company_do_not_move_a_drawing() -> None:
    split = split_drawings(MANY)
    assert split_drawings(MANY[::-1]) == split
    few = [d for d in MANY if d.concept in {"concept 3", "concept 700"}]
    assert all(split[d] == name for d, name in split_drawings(few).items())


def test_five_of_the_tiny_worlds_64_concepts_are_held_out_from_five_groups() -> None:
    heldout = {group: [c for c in names if is_heldout_concept(c)] for group, names in TINY_CONCEPTS.items()}
    assert sum(map(len, TINY_CONCEPTS.values())) == 64
    assert sorted(map(len, heldout.values())) == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", [TRAIN, HELDOUT_DRAWINGS])
def test_no_image_of_seen_concepts_may_show_a_held_out_one(name: str, catalogue: Catalogue) -> None:
    drawings = [*MANY, *catalogue.drawings]
    assert not any(is_heldout_concept(d.concept) for d in allowed_drawings(drawings, split_drawings(drawings), name))
