from pathlib import Path

import numpy as np
import pytest

from data_pipelines.emoji.drawings import Catalogue, rasterise, read_catalogue, select_drawings, split_tone
from emma_train.errors import UserError


def test_catalogue_counts_every_drawing_and_the_unmatched_concepts(catalogue: Catalogue) -> None:
    assert len(catalogue.drawings) == 6 * 3 + 3 + 3 + 1
    assert catalogue.unmatched == ("nameless thing",)
    assert catalogue.version == "9.9.9"
    groups = {d.concept: d.group for d in catalogue.drawings}
    assert groups["blue fish"] == "Animals & Nature"
    assert groups["nameless thing"] is None


def test_a_name_that_ends_like_a_tone_stays_whole(catalogue: Catalogue) -> None:
    assert split_tone("police-car-light", {"waving-hand"}) == ("police-car-light", None)
    assert split_tone("waving-hand-medium-dark", {"waving-hand"}) == ("waving-hand", "medium-dark")
    tones = {d.tone for d in catalogue.drawings if d.concept == "waving hand" and d.style == "flat"}
    assert tones == {"default", "light", "dark"}


def test_select_keeps_the_wanted_and_names_the_missing(catalogue: Catalogue) -> None:
    kept = select_drawings(catalogue.drawings, frozenset({"waving hand", "red circle"}), frozenset({"default"}))
    assert len(kept) == 6
    with pytest.raises(UserError, match="purple cow"):
        select_drawings(catalogue.drawings, frozenset({"purple cow"}), None)


def test_rasterise_gives_the_side_asked_for(catalogue: Catalogue) -> None:
    flat = next(d for d in catalogue.drawings if d.id == "flat/red-circle")
    pixels = np.asarray(rasterise(flat.path, 40))
    assert pixels.shape == (40, 40, 4)
    assert tuple(pixels[20, 20]) == (0xCC, 0x22, 0x22, 255)
    assert pixels[0, 0, 3] == 0


def test_broken_input_is_the_users_error(tmp_path: Path, package: Path) -> None:
    with pytest.raises(UserError, match="no icons"):
        read_catalogue(tmp_path, package / "data-by-emoji.json")
    broken = tmp_path / "broken.json"
    broken.write_text("[")
    with pytest.raises(UserError, match=r"broken\.json"):
        read_catalogue(package, broken)
    bad = tmp_path / "bad.svg"
    bad.write_text("<svg")
    with pytest.raises(UserError, match=r"bad\.svg"):
        rasterise(bad, 32)
