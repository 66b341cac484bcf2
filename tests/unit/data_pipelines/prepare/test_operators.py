"""The operators that need no model, against answers known by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.prepare.operator import load_operator
from data_pipelines.prepare.operators.decontaminate import GRAM, HashList, band_masks, grams, word_list
from data_pipelines.prepare.operators.edit_kind import edit_kind
from data_pipelines.prepare.operators.language import language_of
from data_pipelines.prepare.operators.phash import perceptual_hash
from data_pipelines.prepare.operators.quality import given_scores, repetition
from data_pipelines.prepare.operators.stem import stem_label
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError
from tests.shards import jpeg_with_orientation, png


class MemoryRecord(StoredRecord):
    """A record whose members are in memory."""

    def __init__(self, members: dict[str, bytes], rows: dict, columns: dict | None = None) -> None:
        super().__init__("key", rows, io.BytesIO(), columns)
        self.__dict__["members"] = {name: memoryview(data) for name, data in members.items()}


def record(text: str = "a dog", image: bytes = b"", tags: tuple = (), columns: dict | None = None) -> MemoryRecord:
    content = {"t2i": [{"target": "img0", "text": text}], "provenance": {"dataset": "set", "config": "ai2d(gpt4v)"}}
    row = {"widths": [640, 200], "heights": [320, 300], "target": [0], "tags": list(tags)}
    return MemoryRecord({"json": json.dumps(content).encode(), "img0.png": image or png(1)}, {"t2i": row}, columns)


def values(name: str, one: StoredRecord, **settings: object) -> dict:
    operator = load_operator(name).with_settings(settings)
    columns = operator.start(operator.settings)([one])
    assert list(columns) == list(operator.columns)
    return {name: column[0] for name, column in columns.items()}


def drawing(seed: int, side: int = 256) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, width, height = (rng.integers(0, side, 4) * 0.7).tolist()
        draw.rectangle((x, y, x + width / 2 + 20, y + height / 2 + 20), tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", **options})
    return file.getvalue()


def test_size_is_of_the_image_that_is_made_and_its_min_side_of_all() -> None:
    size = values("size", record())
    assert size == {"width": 640, "height": 320, "aspect": 2.0, "min_side": 200, "pixels": 204_800, "images": 2}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("the dog is on the grass", "en"),
        ("一只狗在草地上", "zh"),
        ("犬が草の上にいます", "ja"),
        ("개가 잔디 위에 있다", "ko"),
        ("собака на траве", "cyrillic"),
        ("Der Hund liegt auf dem grünen Gras", "latin"),
        ("12 + 3 = 15", ""),
        ("dog", "latin"),
    ],
)
def test_language_of_a_text(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_hash_survives_size_and_quality_and_tells_images_apart() -> None:
    originals = [drawing(seed) for seed in range(20)]
    hashes = [int(perceptual_hash(encoded(image, format="PNG")), 16) for image in originals]
    copies = [int(perceptual_hash(encoded(image.resize((160, 160)), quality=60)), 16) for image in originals]
    same = [(one ^ other).bit_count() for one, other in zip(hashes, copies, strict=True)]
    different = [(hashes[i] ^ hashes[j]).bit_count() for i in range(20) for j in range(i)]
    assert max(same) <= 6 and min(different) > 6


def test_a_hash_is_of_the_image_as_people_see_it() -> None:
    assert len({perceptual_hash(jpeg_with_orientation(n, 256, 128)) for n in (1, 6, 8)}) == 1


def test_hashes_within_the_distance_are_always_retrieved() -> None:
    rng = np.random.default_rng(0)
    known = [int(value) for value in rng.integers(0, 2**63, 300)]
    hashes = HashList([f"{value:016x}" for value in known], max_bits=6)
    for value in known[:100]:
        bits = rng.choice(64, 7, replace=False).tolist()
        near, far = value, value
        for bit in bits[:6]:
            near ^= 1 << bit
        for bit in bits:
            far ^= 1 << bit
        assert hashes.nearest(f"{near:016x}") == (6, f"{value:016x}")
        assert hashes.nearest(f"{far:016x}") is None
    assert sum(band_masks(7)) == 2**64 - 1


def test_thirteen_words_in_common_are_contamination_and_twelve_are_not(tmp_path: Path) -> None:
    prompt = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt.upper()}) + "\n" + json.dumps({"tag": ["a photo of a bench"]}) + "\n")
    words = prompt.split()
    thirteen, twelve = " ".join(words[:GRAM]), " ".join(words[: GRAM - 1])
    settings = {"prompts": [str(file)]}
    hit = values("decontaminate", record(f"see {thirteen}."), **settings)
    assert hit == {"contaminated": True, "prompt": thirteen, "prompt_file": "prompts.jsonl", "image_hash": None}
    assert not values("decontaminate", record(f"see {twelve}, then a dog"), **settings)["contaminated"]
    assert values("decontaminate", record("A photo of a bench!"), **settings)["contaminated"]
    assert not values("decontaminate", record("A photo of a bench and a dog"), **settings)["contaminated"]
    assert word_list("A 狗，dog's") == ["a", "狗", "dog", "s"] and grams("a dog") == set()


def test_a_benchmark_image_at_another_size_is_contamination(tmp_path: Path) -> None:
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "one.png").write_bytes(encoded(drawing(5), format="PNG"))
    settings = {"images": [str(tmp_path / "benchmark")]}
    copy, other = encoded(drawing(5).resize((200, 200)), quality=70), encoded(drawing(6))
    assert values("decontaminate", record(image=copy), **settings)["contaminated"]
    assert not values("decontaminate", record(image=other), **settings)["contaminated"]


def test_decontaminate_without_a_benchmark_or_with_a_wrong_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows no benchmark"):
        values("decontaminate", record())
    (tmp_path / "hashes.txt").write_text("0123456789abcdef\nxyz\n")
    with pytest.raises(UserError, match="entry 2, 'xyz', is no hash"):
        values("decontaminate", record(), hashes=[str(tmp_path / "hashes.txt")])


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("ai2d", "stem"),
        ("ai2d(gpt4v)", "stem"),
        ("geo170k(align)", "stem"),
        ("TQA(cauldron,llava_format)", "stem"),
        ("MathV360K_VQA-RAD", "stem"),
        ("vision_flan(filtered)", "general"),
        ("sharegpt4v(coco)", "general"),
        ("LLaVA-558K", "general"),
        ("something_new", "unknown"),
        ("", "unknown"),
    ],
)
def test_stem_by_the_table_of_sources(source: str, label: str) -> None:
    assert stem_label(source) == label


def test_a_tag_decides_before_the_source_and_columns_before_provenance() -> None:
    assert values("stem", record()) == {"label": "stem", "source": "ai2d(gpt4v)"}
    assert values("stem", record(tags=("general",)))["label"] == "general"
    assert values("stem", record(columns={"source": {"source": "vqav2"}}))["label"] == "general"
    assert values("stem", record(columns={"source": {"source": "birds"}}), stem=["birds"])["label"] == "stem"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("addition", "add"),
        ("removal", "remove"),
        ("obj_swap", "replace"),
        ("background_swap", "background"),
        ("env", "tone"),
        ("style", "tone"),
        ("attribute_modification", "tone"),
        ("try-on", "try-on"),
        ("text", "text"),
        ("viewpoint", "other"),
    ],
)
def test_names_of_edits_that_sources_give_are_the_papers_seven_kinds(name: str, kind: str) -> None:
    assert edit_kind(name) == kind


def test_quality_is_the_lowest_score_and_null_where_there_is_none() -> None:
    columns = {"relevance_ratings": [5, None, 2], "relevance_min": 2, "formatting_min": float("nan"), "source": "x"}
    quality = values("quality", record("go on go on go on", columns={"source": columns}))
    assert (quality["score"], quality["num_scores"], quality["answer_words"]) == (2.0, 3, 6)
    assert quality["mean_score"] == 3.0 and quality["repetition"] == 0.5
    assert values("quality", record())["score"] is None
    assert given_scores({"a_min": True, "b_min": "5", "c": 1}, ["_min"]) == []
    assert repetition("a dog") == 0.0
