"""Small public models with random weights, in folders as transformers and diffusers write them.

llm(folder)           Qwen3ForCausalLM of the sizes in tests/helpers.py
vision(folder)        SiglipVisionModel likewise, with its pooling head
siglip(folder, tower) SiglipModel: a text tower and `tower`
autoencoder(folder)   AutoencoderDC, 32 channels at 32x
prefixed(folder)      rewrites a SiglipVisionModel's keys as transformers 4 wrote them
change(folder, f)     rewrites a folder's tensors

Each of the first four returns the model in eval mode; `shard` (such as "20KB") splits its weights into several files.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers import ASSETS, DECODER, PATCH, VISION, randomise

THETA = 50000.0


def llm(folder: Path, shard: str = "1GB", seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """rope_theta and eps differ from both defaults. The folder gets the tiny recipes' tokenizer too."""
    sizes = {
        "vocab_size": DECODER["vocab"],
        "hidden_size": DECODER["hidden"],
        "intermediate_size": DECODER["intermediate_size"],
        "num_hidden_layers": DECODER["num_layers"],
        "num_attention_heads": DECODER["heads"],
        "num_key_value_heads": DECODER["kv_heads"],
        "head_dim": DECODER["head_dim"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes})).eval()
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copyfile(ASSETS / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    return model


def vision(folder: Path, shard: str = "1GB", seed: int = 0, **changes: Any) -> SiglipVisionModel:
    model = SiglipVisionModel(_vision_config(**changes)).eval()
    randomise(model, seed)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def siglip(folder: Path, tower: SiglipVisionModel, shard: str = "1GB") -> SiglipModel:
    text = SiglipTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict())).eval()
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def autoencoder(folder: Path, shard: str = "1GB", seed: int = 0, **changes: Any) -> AutoencoderDC:
    blocks = ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2
    scales = [[], [], [], [], [5], [5]]
    settings = {
        "latent_channels": 32,
        "attention_head_dim": 8,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": [8, 8, 8, 16, 32, 32],
        "decoder_block_out_channels": [8, 8, 8, 16, 32, 32],
        "encoder_layers_per_block": [1] * 6,
        "decoder_layers_per_block": [1] * 6,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "scaling_factor": 0.41407,
    }
    torch.manual_seed(seed)
    model = AutoencoderDC(**{**settings, **changes}).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def prefixed(folder: Path) -> None:
    """Put `vision_model.` before every key."""
    change(folder, lambda tensors: {f"vision_model.{key}": value for key, value in tensors.items()})


def change(
    folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor] | None], file: str = "model.safetensors"
) -> None:
    """Rewrite a file with the tensors that `how` returns, or that it changed in its argument."""
    tensors = load_file(folder / file)
    save_file(how(tensors) or tensors, folder / file, metadata={"format": "pt"})


@contextlib.contextmanager
def config_of(folder: Path) -> Any:
    """The folder's config.json as a dict; changes are written back."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    yield values
    path.write_text(json.dumps(values))


def _vision_config(**changes: Any) -> SiglipVisionConfig:
    sizes = {
        "hidden_size": VISION["hidden"],
        "intermediate_size": VISION["intermediate_size"],
        "num_hidden_layers": VISION["num_layers"],
        "num_attention_heads": VISION["heads"],
        "image_size": VISION["position_grid"] * PATCH,
        "patch_size": PATCH,
    }
    return SiglipVisionConfig(**{**sizes, **changes})
