"""The task recon: an image is made again from its semantic half; its latent is not in the condition."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.loader.sample_builder import SampleBuilder
from data_pipelines.planner.candidates import SampleRef
from emma_train.model.emma import Emma
from emma_train.sequence.layout import ImageRole, ImageSegment, TextSegment
from emma_train.sequence.pack import Sample, pack
from emma_train.sequence.tasks import RECONSTRUCTION_PROMPT, TASKS
from tests.helpers import (
    PATCH,
    SHUFFLE,
    i2t_sample,
    pixels,
    scaled_latents,
    t2i_sample,
    tiny_emma,
    tiny_recipe,
    tokenizer,
)
from tests.shards import prompt

TASK = TASKS["recon"]


def recon_sample(key: str = "r", shown_seed: int = 1, latent_seed: int = 1) -> Sample:
    """Condition and target are separate images here, so that a test can change one of them alone."""
    segments = TASK.layout(tokenizer(), ["img0"], {"target": "target"})
    condition = pixels(2, 2, seed=shown_seed)
    condition.latent = np.random.default_rng(latent_seed).standard_normal((4, 32), dtype=np.float32)
    return Sample(key, "recon", segments, {"img0": condition, "target": pixels(2, 2, seed=9)}, 5, 6)


@pytest.fixture
def model() -> Iterator[Emma]:
    model = tiny_emma()
    with torch.no_grad():  # the velocity head starts at zero
        model.velocity_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        yield model


def velocity(model: Emma, *samples: Sample) -> Tensor:
    batch = pack(samples)
    return model(batch, scaled_latents(batch), torch.full((batch.counts[3],), 0.5)).velocity


def test_the_layout_shows_the_semantic_half_and_then_makes_the_image() -> None:
    segments = TASK.layout(tokenizer(), TASK.shown_images({"target": "img3"}), {"target": "img3", "text": "a fish"})
    images = [s for s in segments if isinstance(s, ImageSegment)]
    assert images == [ImageSegment("img3", ImageRole.UND, semantic_only=True), ImageSegment("img3", ImageRole.TARGET)]
    text = "".join(tokenizer().decode(list(s.ids)) for s in segments if isinstance(s, TextSegment))
    assert RECONSTRUCTION_PROMPT in text and "a fish" not in text
    assert not any(s.supervised for s in segments if isinstance(s, TextSegment))


def test_the_prediction_depends_on_the_pixels_of_the_condition_and_not_on_its_latent(model: Emma) -> None:
    first = velocity(model, recon_sample())
    assert torch.equal(velocity(model, recon_sample(latent_seed=2)), first)
    assert not torch.allclose(velocity(model, recon_sample(shown_seed=2)), first)


def test_other_samples_of_the_pack_keep_their_latents(model: Emma) -> None:
    question = i2t_sample("q")
    batch = pack([question, recon_sample()])
    assert batch.semantic_only is not None and batch.semantic_only.tolist() == [False] * 4 + [True] * 4
    alone, both = pack([question]), scaled_latents(batch)
    together = model(batch, both, torch.full((4,), 0.5)).logits
    torch.testing.assert_close(together, model(alone, scaled_latents(alone), torch.zeros(0)).logits)
    changed = both.clone()
    changed[:4] += 1.0
    assert not torch.allclose(model(batch, changed, torch.full((4,), 0.5)).logits, together)


def test_a_pack_without_the_task_has_no_mask() -> None:
    assert pack([i2t_sample(), t2i_sample()]).semantic_only is None


def test_a_t2i_alternative_serves_it_with_one_image_shown_and_made() -> None:
    key, record, images = prompt("p0", "a long caption that the task does not use")
    members = {"json": memoryview(json.dumps(record).encode()), **{k: memoryview(v) for k, v in images.items()}}
    recipe = tiny_recipe(data__reference_dropout=0.0)
    ref = SampleRef(key, "recon", "", "", 0, 0, 0, 0, 0, 0, 0)
    side = recipe.data.gen.side // (PATCH * SHUFFLE)
    latent = np.zeros((side * side, 32), np.float32)
    for cached in (None, latent):
        builder = SampleBuilder(recipe.data, tokenizer(), PATCH, SHUFFLE)
        sample = builder.sample(ref, members, lambda name, config, cached=cached: cached)
        assert list(sample.images) == ["img0"] and sample.images["img0"].patches is not None
        assert len(pack([sample]).grids[ImageRole.UND]) == len(pack([sample]).grids[ImageRole.TARGET]) == 1
