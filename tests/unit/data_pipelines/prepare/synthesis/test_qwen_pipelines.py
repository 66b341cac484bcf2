"""The real Qwen-Image editing pipelines of diffusers, tiny and random, called as synthesis calls them.

Their processor needs torchvision, which the project does without, so a small one of our own stands in its place, and
the pipeline is made in memory instead of loaded.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from data_pipelines.prepare.synthesis.image_pipeline import ImagePipeline
from tests.helpers import ASSETS

PAD = "<|image_pad|>"


class Processor:
    """Texts and images to tokens, with a pad token for each patch of the images."""

    def __init__(self) -> None:
        special = [PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(ASSETS / "tokenizer" / "tokenizer.json"),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=special,
        )
        self.images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, text: Any, images: Any, **options: Any) -> transformers.BatchFeature:
        seen = self.images(images=images if isinstance(images, list) else [images], return_tensors="pt")
        counts = iter([int(grid.prod()) // 4 for grid in seen["image_grid_thw"]])
        texts = []
        for each in [text] if isinstance(text, str) else text:
            first, *rest = each.split(PAD)
            texts.append(first + "".join(PAD * next(counts) + part for part in rest))
        return transformers.BatchFeature({**self.tokenizer(texts, padding=True, return_tensors="pt"), **seen})


def tiny_pipeline(name: str) -> diffusers.DiffusionPipeline:
    processor = Processor()
    number = processor.tokenizer.convert_tokens_to_ids
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    heads = {"num_key_value_heads": 2, "vocab_size": len(processor.tokenizer), "rope_scaling": rope}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    torch.manual_seed(0)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**text, **heads},
            vision_config={**vision, "fullatt_block_indexes": [1]},
            image_token_id=number(PAD),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_a_pipeline_of_qwen_image_edits_an_image_as_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, calls = tiny_pipeline(name), []
    kind = getattr(diffusers, name)
    call = kind.__call__
    monkeypatch.setattr(kind, "from_pretrained", classmethod(lambda cls, *args, **options: pipeline))
    editor = ImagePipeline(name, Path("weights"), steps=1, device="cpu")
    assert editor.edits

    def recorded(self: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return call(self, **arguments)

    monkeypatch.setattr(kind, "__call__", recorded)
    image = editor.run("make it red", 3, Image.new("RGB", (64, 64), "blue"))
    assert image.mode == "RGB"
    assert image.size == (1024, 1024), "these pipelines work at an area of 1024²"
    assert np.asarray(image).std() > 0
    (arguments,) = calls
    assert (arguments["true_cfg_scale"], arguments["negative_prompt"]) == (4.0, " ")
