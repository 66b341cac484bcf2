"""Builds a small data set from the toy package: same bytes every time, the right amounts, complete records."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines.emoji import splits
from data_pipelines.emoji.build import PROMPT_KINDS, BuildSettings, build_set
from data_pipelines.emoji.concepts import Amounts, EmojiWorld
from data_pipelines.emoji.drawings import Catalogue
from emma_train.errors import UserError

Records = list[tuple[str, str, dict[str, Any], dict[str, bytes]]]
ReadSet = Callable[[Path], Records]

WORLD = EmojiWorld("toy", None, None, Amounts(20, 12, 3), Amounts(6, 6, 1), Amounts(4, 6, 0))
SETTINGS = BuildSettings(side=32, shard_samples=15)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    out = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "CONCEPT_SHARE", 0.3)
        patch.setattr(splits, "DRAWING_SHARE", 0.3)
        build_set(catalogue, WORLD, out, SETTINGS)
    return out


def test_twice_the_same_bytes(toy: Path, tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "CONCEPT_SHARE", 0.3)
    monkeypatch.setattr(splits, "DRAWING_SHARE", 0.3)
    build_set(catalogue, WORLD, tmp_path / "again", SETTINGS)
    first = {p.relative_to(toy): p.read_bytes() for p in toy.rglob("*.tar")}
    second = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in tmp_path.rglob("*.tar")}
    assert len(first) == 5
    assert first == second


def test_another_seed_gives_other_images(toy: Path, tmp_path: Path, catalogue: Catalogue) -> None:
    build_set(catalogue, WORLD, tmp_path / "other", BuildSettings(side=32, shard_samples=15, seed=1))
    shard = "train/shard-000000.tar"
    assert (tmp_path / "other" / shard).read_bytes() != (toy / shard).read_bytes()


def test_every_split_has_what_its_world_asks_for(toy: Path, read_set: ReadSet) -> None:
    counts: dict[tuple[str, str], int] = {}
    keys = set()
    for split, key, _, _ in read_set(toy):
        kind = key.split("-")[1]
        counts[split, kind] = counts.get((split, kind), 0) + 1
        keys.add(key)
    assert counts == {
        ("train", "single"): 20, ("train", "pair"): 12, ("train", "stem"): 3,
        ("heldout_drawings", "single"): 6, ("heldout_drawings", "pair"): 6, ("heldout_drawings", "stem"): 1,
        ("heldout_concepts", "single"): 4, ("heldout_concepts", "pair"): 6,
    }  # fmt: skip
    assert len(keys) == 58


def test_records_are_whole(toy: Path, read_set: ReadSet) -> None:
    for _, _, record, files in read_set(toy):
        assert set(files) == {f"{name}.webp" for name in record["pictures"]}
        for data in files.values():
            assert Image.open(io.BytesIO(data)).size == (32, 32)
        used = [name for alternative in record["i2t"] for name in alternative["images"]]
        used += [alternative["target"] for task in ("t2i", "it2i") for alternative in record.get(task, [])]
        assert set(used) == set(record["pictures"])
        assert all(alternative["kind"] for alternative in record["i2t"])


def test_a_folder_with_shards_is_refused(toy: Path, catalogue: Catalogue) -> None:
    with pytest.raises(UserError, match="already holds shards"):
        build_set(catalogue, WORLD, toy, SETTINGS)


def test_scenes_have_one_prompt_of_each_kind_in_turn(tmp_path: Path, catalogue: Catalogue, read_set: ReadSet) -> None:
    world = replace(WORLD, train=Amounts(2, 0, 0, scenes=12), scene_captions=True)
    build_set(catalogue, world, tmp_path / "scenes", SETTINGS)
    records = [
        record for split, key, record, _ in read_set(tmp_path / "scenes") if split == "train" and "-scene-" in key
    ]
    kinds = Counter(record["t2i"][0]["kind"] for record in records)
    assert len(records) == 12 and kinds["counting"] >= 2 and set(kinds) <= set(PROMPT_KINDS)
    for record in records:
        layers = record["labels"]["scenes"]["img0"]["layers"]
        answers = {alternative["kind"]: alternative["turns"][-1]["text"] for alternative in record["i2t"]}
        assert answers["count"] == {1: "one", 2: "two", 3: "three"}[len(layers)]
        assert len(answers) == 3
