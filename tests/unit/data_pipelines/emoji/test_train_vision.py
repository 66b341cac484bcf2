"""The tiny SigLIP: what counts as a right caption, and a short training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionModel

from data_pipelines.emoji import train_vision
from data_pipelines.emoji.foundation import MEASURES_FILE, read_split
from data_pipelines.emoji.splits import TRAIN, is_heldout_concept
from data_pipelines.emoji.train_vision import CaptionedImage, captioned_images, meaning, same_meaning, sigmoid_loss
from emma_train.config.load import load_recipe
from emma_train.export.hf_names import vision_config
from emma_train.export.import_hf import import_pretrained
from tests import public
from tests.helpers import ASSETS, ROOT

TINY = load_recipe(ROOT / "recipes" / "tiny" / "stage0.yaml")


def test_captions_say_the_same_exactly_where_they_describe_the_same_scene() -> None:
    scenes: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for record, _ in read_split(ASSETS / "emoji", TRAIN):
        labels = record["labels"]
        if "background" in labels:  # one drawing; big and medium are not mentioned
            scene = (*record["provenance"]["drawings"], labels["background"], labels["place"])
            scene += ("small",) if labels["size"] == "small" else ()
            scenes.setdefault(scene, set()).update(meaning(item["text"]) for item in record["t2i"])
    assert len(scenes) > 700 and all(len(meanings) == 1 for meanings in scenes.values())
    assert len(set().union(*scenes.values())) == len(scenes)


def test_equal_scenes_of_a_batch_are_right_for_each_other() -> None:
    texts = ["a flat cat on a white background", "cat, flat style, white background", "a flat cat on a pink background"]
    fits = same_meaning([CaptionedImage(b"", (text,)) for text in texts])
    assert fits.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_loss_is_that_of_siglip_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    terms = [2.0, 1.0, -0.0, 3.0]  # the sign turned where the pair does not fit
    expected = sum(math.log1p(math.exp(-term)) for term in terms) / 2
    assert float(sigmoid_loss(logits, torch.eye(2, dtype=torch.bool))) == pytest.approx(expected)


def test_images_without_a_description_are_left_out_and_formulas_are_described() -> None:
    labels = {"concepts": [], "stem": "formula", "formula": "x^{2}"}
    records = [
        ({"labels": {}, "t2i": [{"target": "img1", "text": "a cat"}]}, {"img0": b"0", "img1": b"1"}),
        ({"labels": labels}, {"img0": b"2"}),
    ]
    images = list(captioned_images(records))
    assert images == [CaptionedImage(b"1", ("a cat",)), CaptionedImage(b"2", ("formula x^{2}",))]


@pytest.mark.seconds
def test_the_command_trains_on_train_alone_and_its_folder_is_a_siglip_that_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def short_training(images: list[CaptionedImage], *rest: Any) -> Any:
        seen["images"] = images
        model, seen["losses"] = train_in_steps(images[:96], *rest, steps=8)
        return model, seen["losses"]

    train_in_steps = train_vision.train_vision
    monkeypatch.setattr(train_vision, "train_vision", short_training)
    out = tmp_path / "siglip2"
    recipe = str(ROOT / "recipes" / "tiny" / "stage0.yaml")
    assert train_vision.main(["--data", str(ASSETS / "emoji"), "--out", str(out), "--recipe", recipe]) == 0

    of_train = {data for _, files in read_split(ASSETS / "emoji", TRAIN) for data in files.values()}
    captions = {caption for image in seen["images"] for caption in image.captions}
    heldout = [name for name in ("baby", "doughnut", "magnet", "pig face", "teddy bear") if is_heldout_concept(name)]
    assert len(seen["images"]) > 1000 and all(image.file in of_train for image in seen["images"])
    assert len(heldout) == 5 and not any(name in caption for name in heldout for caption in captions)
    assert seen["losses"][-1] < 0.8 * seen["losses"][0]
    model = SiglipVisionModel.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    sizes = vision_config(json.loads((out / "config.json").read_text()), str(out))
    ours = {"expert_layers": sizes.expert_layers, "router_hidden": sizes.router_hidden}  # no public model has these
    assert sizes == dataclasses.replace(TINY.model.vision, **ours)
    assert {"heldout_images", "chance", "text_to_image_at_1"} < set(json.loads((out / MEASURES_FILE).read_text()))
    llm = tmp_path / "llm"
    public.llm(llm)
    import_pretrained(tmp_path / "initial", llm, out, ASSETS / "autoencoder", llm)
