"""Operators with models that come in packages, on images whose content is known."""

import importlib.util
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data_pipelines.prepare.face_distance import SAME_PERSON, farthest_face
from data_pipelines.prepare.operator import load_operator
from data_pipelines.prepare.operators.faces import face_model_folder
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError
from tests.shards import png

FACE_MODELS = os.environ.get("EMMA_FACE_MODELS", "")


class ImageRecord(StoredRecord):
    """A record of images in memory."""

    def __init__(self, *images: Image.Image | bytes, columns: dict | None = None) -> None:
        super().__init__("key", {"t2i": {"target": [0]}}, io.BytesIO(), columns)
        members = {
            f"img{i}.png": image if isinstance(image, bytes) else encoded(image) for i, image in enumerate(images)
        }
        members["json"] = json.dumps({"t2i": [{"target": "img0", "text": "a photo"}]}).encode()
        self.__dict__["members"] = {name: memoryview(data) for name, data in members.items()}


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def values(name: str, *records: StoredRecord, **settings: object) -> list[dict]:
    operator = load_operator(name).with_settings(settings)
    columns = operator.start(operator.settings)(records)
    assert list(columns) == list(operator.columns)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(records))]


def photo(name: str) -> Image.Image:
    """A photograph that is in the wheel of scikit-image."""
    skimage = pytest.importorskip("skimage", reason="pip install scikit-image: photographs")
    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def written(text: str, size: int = 40) -> Image.Image:
    matplotlib = pytest.importorskip("matplotlib", reason="pip install 'emma-train[data]': a font")
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", size)
    image = Image.new("RGB", (384, 128), (135, 188, 245))
    ImageDraw.Draw(image).text((192, 64), text, (0, 0, 0), font, anchor="mm")
    return image


@pytest.mark.seconds
def test_texts_are_read_and_an_image_without_text_has_none() -> None:
    pytest.importorskip("rapidocr", reason="pip install 'emma-train[ocr]'")
    beach, nothing = values("ocr", ImageRecord(written("BEACH 2026")), ImageRecord(Image.new("RGB", (384, 128))))
    assert " ".join(beach["texts"]) == "BEACH 2026"
    assert min(beach["scores"]) > 0.9
    left, top, right, bottom = (
        pick(side) for pick, side in zip((min, min, max, max), zip(*beach["boxes"], strict=True), strict=True)
    )
    assert 40 < left < 80 and 300 < right < 350 and 30 < top < 55 and 75 < bottom < 100
    assert 0.1 < beach["share"] <= (right - left) * (bottom - top) / (384 * 128)
    assert nothing == {"texts": [], "scores": [], "boxes": [], "lines": 0, "share": 0.0}


@pytest.mark.seconds
def test_a_portrait_is_one_and_changes_of_light_keep_the_person() -> None:
    pytest.importorskip("dlib", reason="pip install 'emma-train[faces]'")
    if not FACE_MODELS and importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("pip install 'emma-train[faces]', or set EMMA_FACE_MODELS to the folder of its .dat files")
    astronaut, coffee = photo("astronaut.png"), photo("coffee.png")
    darker = ImageEnhance.Brightness(astronaut).enhance(0.6)
    portrait, general = values("faces", ImageRecord(astronaut, darker, coffee), ImageRecord(coffee), models=FACE_MODELS)
    assert (portrait["count"], portrait["kind"]) == (1, "portrait")
    assert 0.02 < portrait["share"] < 0.2
    assert [len(faces) for faces in portrait["embeddings"]] == [1, 1, 0]
    before, after = portrait["embeddings"][:2]
    assert 0 < farthest_face(before, after) < SAME_PERSON / 2
    assert general == {"count": 0, "share": 0.0, "kind": "general", "embeddings": [[]]}


def test_face_models_that_are_missing_are_named(tmp_path: Path) -> None:
    pytest.importorskip("dlib", reason="pip install 'emma-train[faces]'")
    with pytest.raises(UserError, match="shape_predictor_5_face_landmarks.dat: no such file"):
        values("faces", ImageRecord(png(0)), models=str(tmp_path))
    assert face_model_folder("a/b") == Path("a/b")


@pytest.mark.parametrize("column", ["AESTHETIC_SCORE", "aesthetic", "aesthetic_score", "mine"])
def test_the_score_of_the_source_counts_under_all_its_names(column: str) -> None:
    one = ImageRecord(png(0), columns={"source": {column: 6.25, "similarity": 0.3}})
    settings = {"brisque": False, "columns": ["mine"]}
    assert values("aesthetic", one, **settings) == [{"score": 6.25, "kind": "source"}]


@pytest.mark.parametrize("given", [{}, {"aesthetic": None}, {"aesthetic": float("nan")}, {"aesthetic": "6.2"}])
def test_without_a_score_there_is_none(given: dict) -> None:
    one = ImageRecord(png(0), columns={"source": given})
    assert values("aesthetic", one, brisque=False) == [{"score": None, "kind": None}]


@pytest.mark.seconds
def test_brisque_prefers_a_photograph_to_its_blurred_and_noisy_copies() -> None:
    pytest.importorskip("brisque", reason="pip install 'emma-train[aesthetic]'")
    original = photo("astronaut.png")
    noise = np.random.default_rng(0).normal(0, 40, (*original.size[::-1], 3))
    noisy = Image.fromarray(np.clip(np.asarray(original) + noise, 0, 255).astype(np.uint8))
    copies = [original, original.filter(ImageFilter.GaussianBlur(4)), noisy]
    scores = [row["score"] for row in values("aesthetic", *map(ImageRecord, copies))]
    assert scores[0] > max(scores[1:]) + 10


@pytest.mark.seconds
def test_a_model_by_its_folder_gives_its_own_numbers(tmp_path: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**small, image_size=32, patch_size=16, id2label={0: "normal", 1: "nsfw"}, label2id={})
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.open(io.BytesIO(png(3, 64)))
    expected = model(**processor(images=[np.asarray(image)], return_tensors="pt")).logits.softmax(1)[0, 1].item()
    given = ImageRecord(png(3, 64), columns={"source": {"punsafe": 0.75, "pwatermark": 0.5}})
    by_model, by_source = values("safety", ImageRecord(image), given, nsfw_model=str(tmp_path))
    assert by_model == {"nsfw": pytest.approx(expected, abs=1e-6), "watermark": None}
    assert by_source == {"nsfw": 0.75, "watermark": 0.5}
    with pytest.raises(UserError, match="has no label 'aesthetic'; its labels are normal, nsfw"):
        values("aesthetic", ImageRecord(image), model=str(tmp_path))
    with pytest.raises(UserError, match="no image classifier that transformers reads"):
        values("aesthetic", ImageRecord(image), model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("source", "nsfw"), [({"NSFW": "UNLIKELY"}, 0.1), ({"NSFW": "nsfw"}, 0.9), ({"NSFW": ""}, None), ({}, None)]
)
def test_words_of_laion_400m_are_numbers_and_silence_is_not_safe(source: dict, nsfw: float | None) -> None:
    assert values("safety", ImageRecord(png(0), columns={"source": source})) == [{"nsfw": nsfw, "watermark": None}]
