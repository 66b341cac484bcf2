"""Checks every record of the data set in the repository."""

import io
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from data_pipelines.cli import main
from data_pipelines.emoji.concepts import TINY, TINY_CONCEPTS
from data_pipelines.emoji.scenes import BACKGROUNDS
from data_pipelines.emoji.splits import SPLITS, is_heldout_concept

ASSETS = Path(__file__).parents[4] / "recipes" / "tiny" / "assets"
Records = list[tuple[str, str, dict[str, Any], dict[str, bytes]]]


@pytest.fixture(scope="module")
def prebuilt(read_set: Callable[[Path], Records]) -> Records:
    return read_set(ASSETS / "emoji")


def concept_of(drawing: str) -> str:
    """`flat/waving-hand-dark` -> `waving hand`."""
    name = drawing.split("/")[1].replace("-", " ")
    return max((c for c in TINY.concepts or () if name == c or name.startswith(f"{c} ")), key=len)


def shown_by(records: Records, split: str) -> set[str]:
    return {d for name, _, record, _ in records if name == split for d in record["provenance"]["drawings"]}


def test_splits_are_disjoint_by_drawing_and_by_concept(prebuilt: Records) -> None:
    train = shown_by(prebuilt, "train")
    seen = {concept_of(d) for d in train}
    heldout = {c for names in TINY_CONCEPTS.values() for c in names if is_heldout_concept(c)}
    assert len(seen) == 59
    assert len(heldout) == 5
    assert not seen & heldout
    for split, _, record, _ in prebuilt:
        drawings = set(record["provenance"]["drawings"])
        concepts = {concept_of(d) for d in drawings}
        assert set(record["labels"]["concepts"]) == concepts
        if split == "heldout_drawings" and drawings:
            assert drawings - train
            assert concepts <= seen
        if split == "heldout_concepts":
            assert concepts & heldout
    unseen_drawings = {d for d in shown_by(prebuilt, "heldout_drawings") if d not in train}
    assert len(unseen_drawings) == 25
    assert len(train) == 194


def test_stem_contents_are_disjoint(prebuilt: Records) -> None:
    contents = defaultdict(set)
    for split, _, record, _ in prebuilt:
        if record["tags"] == ["stem"]:
            contents[split].add(str(record["labels"]))
    assert len(contents["train"]) == TINY.train.stem
    assert len(contents["heldout_drawings"]) == TINY.heldout_drawings.stem
    assert not contents["train"] & contents["heldout_drawings"]


def test_it_has_the_amounts_that_it_says_in_at_most_8_megabytes(prebuilt: Records) -> None:
    counts = Counter((split, key.split("-")[1]) for split, key, _, _ in prebuilt)
    for split in SPLITS:
        amounts = getattr(TINY, split)
        assert (counts[split, "single"], counts[split, "pair"]) == (amounts.singles, amounts.pairs)
    assert len({key for _, key, _, _ in prebuilt}) == len(prebuilt)
    committed = [p for p in (ASSETS / "emoji").rglob("*") if p.suffix in {".tar", ".parquet", ".json", ".md", ""}]
    assert sum(p.stat().st_size for p in committed if p.is_file()) <= 8_000_000


def test_labels_captions_answers_and_pixels_agree(prebuilt: Records) -> None:
    for _, key, record, files in prebuilt:
        if "-single-" not in key:
            continue
        labels = record["labels"]
        style = labels["style"].replace("-", " ")
        truth = {**labels, "concept": labels["concepts"][0], "style": style}
        for alternative in record["i2t"]:
            assert alternative["turns"][-1]["text"] == truth[alternative["kind"]]
        assert record["t2i"]
        for alternative in record["t2i"]:
            text = alternative["text"]
            assert all(part in text for part in (truth["concept"], style, f"{labels['background']} background"))
            assert (labels["place"] in text) == (labels["place"] != "centre")
            assert ("small" in text) == (labels["size"] == "small")
        pixels = np.asarray(Image.open(io.BytesIO(files["img0.webp"])).convert("RGB")).astype(int)
        corners = pixels[[1, 1, -2, -2], [1, -2, 1, -2]]
        assert np.abs(np.median(corners, 0) - BACKGROUNDS[labels["background"]]).max() < 8


def test_texts_are_short_and_the_tokenizer_is_theirs(prebuilt: Records) -> None:
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    for word in ("user", "assistant", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"):
        assert len(tokenizer.encode(word).ids) == 1
    for _, _, record, _ in prebuilt:
        for alternative in record.get("t2i", []) + record.get("it2i", []):
            assert len(tokenizer.encode(alternative["text"]).ids) <= 20
        for alternative in record["i2t"]:
            limit = 7 if alternative["kind"] == "stem" else 4
            assert len(tokenizer.encode(alternative["turns"][-1]["text"]).ids) <= limit


@pytest.mark.slow
def test_the_archive_of_drawings_makes_the_held_out_sets_again(tmp_path: Path) -> None:
    """Byte for byte, whatever the size of the training set; without npm and without a network."""
    package = str(ASSETS / "emoji" / "drawings.tgz")
    samples = ["--samples", "12", "6", "4"]
    assert (
        main(["import", "fluent-emoji", str(tmp_path / "set"), "--package", package, "--world", "tiny", *samples]) == 0
    )
    for split in SPLITS[1:]:
        name = f"{split}/shard-000000.tar"
        assert (tmp_path / "set" / name).read_bytes() == (ASSETS / "emoji" / name).read_bytes()
    (shard,) = (tmp_path / "set" / "train").glob("*.tar")
    with tarfile.open(shard) as tar, tarfile.open(ASSETS / "emoji" / "train" / "shard-000000.tar") as committed:
        small, large = ({member.name: member for member in file} for file in (tar, committed))
        for name in small.keys() & large.keys():  # a larger set has the records of a smaller one
            assert tar.extractfile(small[name]).read() == committed.extractfile(large[name]).read()  # type: ignore[union-attr]
        assert small.keys() & large.keys()
