"""What the trainings of the tiny Qwen3 and SigLIP share, and the folders in the repository."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipelines.emoji.foundation import MEASURES_FILE, minimise, random_batches, read_split
from data_pipelines.emoji.splits import HELDOUT_DRAWINGS, SPLITS, is_heldout_concept
from emma_train.errors import UserError
from tests.helpers import ASSETS

EMOJI = ASSETS / "emoji"


def test_every_item_comes_once_before_any_comes_again() -> None:
    batches = random_batches(10, 4, seed=0)
    drawn = [index for _ in range(5) for index in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


def test_training_lowers_a_loss_and_ends_after_its_steps_or_its_time() -> None:
    model = nn.Linear(4, 1)
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def next_loss() -> torch.Tensor:
        return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    losses = minimise(model, next_loss, minutes=1, steps=200)
    assert len(losses) == 200 and losses[-1] < 0.9 * losses[0]
    assert 0 < len(minimise(model, next_loss, minutes=0.2 / 60)) < 2000


def test_a_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train/"):
        next(read_split(tmp_path, "train"))


def test_train_has_no_held_out_drawing_and_no_held_out_concept() -> None:
    train, drawings, _ = ([record for record, _ in read_split(EMOJI, split)] for split in SPLITS)
    singles = [record for record in drawings if len(record["provenance"]["drawings"]) == 1]
    heldout = {drawing for record in singles for drawing in record["provenance"]["drawings"]}
    shown = {drawing for record in train for drawing in record["provenance"]["drawings"]}
    assert len(heldout) == 25 and len(shown) == 194 and not heldout & shown
    assert not any(is_heldout_concept(concept) for record in train for concept in record["labels"]["concepts"])


def test_images_of_held_out_drawings_come_with_their_records() -> None:
    record, files = next(read_split(EMOJI, HELDOUT_DRAWINGS))
    assert set(files) == set(record["pictures"]) and all(data[:4] == b"RIFF" for data in files.values())


def test_shipped_folders_are_small_and_reach_their_bars() -> None:
    sizes = [file.stat().st_size for name in ("qwen3", "siglip2") for file in (ASSETS / name).iterdir()]
    assert sum(sizes) <= 8_000_000
    llm, vision = (json.loads((ASSETS / name / MEASURES_FILE).read_text()) for name in ("qwen3", "siglip2"))
    assert llm["perplexity"] <= 0.5 * llm["perplexity_of_a_unigram"] and llm["heldout_captions"] >= 100
    assert min(vision["text_to_image_at_1"], vision["image_to_text_at_1"]) >= 10 * vision["chance"]
    assert vision["heldout_images"] == round(1 / vision["chance"]) >= 100
    assert max(llm["minutes"], vision["minutes"]) <= 6
