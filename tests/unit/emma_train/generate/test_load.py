"""The type of the weights in generation, and generation in bf16."""

from pathlib import Path

import pytest
import torch

from emma_train.generate.load import load_generator, weight_type
from emma_train.generate.settings import FlowSettings, TextSettings
from emma_train.sequence.request import Request
from tests.helpers import make_image, tiny_recipe, write_export


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
    ],
)
def test_weights_are_bf16_on_a_gpu_and_fp32_on_cpus(precision: str, device: str, dtype: torch.dtype) -> None:
    assert weight_type(precision, torch.device(device)) == dtype


def test_a_model_in_bf16_generates_about_what_it_does_in_fp32(tmp_path: Path) -> None:
    write_export(tmp_path / "export", tiny_recipe("stage3"))
    edit = Request("edit", "it2i", "make it red", [make_image(2, 2)], (64, 64), seed=3)
    latents = {}
    for precision in ("fp32", "bf16"):
        generator, _, _ = load_generator(tmp_path / "export", "cpu", precision=precision)
        (latents[precision],) = generator.generate_latents([edit], FlowSettings(4))
        question = Request("question", "i2t", "What is this?", [make_image(2, 2)])
        assert len(generator.generate_text([question], TextSettings(4))) == 1
    difference = (latents["bf16"] - latents["fp32"]).norm() / latents["fp32"].norm()
    assert latents["bf16"].dtype == torch.float32 and 0 < difference < 0.1


def test_without_experts_every_image_takes_the_versatile_encoder(tmp_path: Path) -> None:
    """The router of this export sends every image to the STEM expert; the paper compares with and without."""
    recipe = tiny_recipe("stage4_router")
    write_export(tmp_path / "export", recipe)
    request = Request("question", "i2t", "What is this?", [make_image(2, 2)])
    tokens = {}
    for threshold, use_experts in ((-1.0, True), (-1.0, False), (2.0, True)):
        generator, _, _ = load_generator(tmp_path / "export", "cpu", use_experts=use_experts)
        generator.model.vision.config.stem_threshold = threshold  # type: ignore[union-attr]
        (likelihood,) = generator.answer_likelihoods([request], ["a cat"])
        tokens[threshold, use_experts] = likelihood.tokens
    assert tokens[-1.0, False] == tokens[2.0, True] != tokens[-1.0, True]
