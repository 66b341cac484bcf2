"""Size and layout of the autoencoder's encoder: from its folder, else those of DC-AE f32c32."""

import json
from pathlib import Path
from typing import Any

import torch

from emma_train.config.schema import Recipe

DC_AE_F32C32: dict[str, Any] = {
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "attention_head_dim": 32,
    "downsample_block_type": "Conv",
}
DC_AE_PARAMETERS = 312_250_275
"""dc-ae-f32c32-sana-1.0, used if the folder in the recipe does not exist."""


def autoencoder_of(recipe: Recipe) -> tuple[int, dict[str, Any], bool]:
    """(number of parameters, config as in diffusers, whether its folder exists)."""
    path = Path(recipe.model.autoencoder.path) / "config.json"
    if not path.is_file():
        return DC_AE_PARAMETERS, DC_AE_F32C32, False
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        model = AutoencoderDC.from_config(json.loads(path.read_text()))
    return sum(p.numel() for p in model.parameters()), dict(model.config), True
