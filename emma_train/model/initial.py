"""Initial weights as a pure function of (seed, parameter name, shape): the same on any number of ranks, one tensor
at a time."""

import math

import torch
from torch import Tensor

from emma_train.config.schema import ModelConfig
from emma_train.sequence.seeds import seed_of

EMBEDDING_STD = 0.1
"""Large enough beside what the first layers add; with 0.02 a small model learned half as fast from scratch."""


def start_value(name: str, shape: torch.Size, config: ModelConfig) -> Tensor:
    """float32 start value of a parameter of this model."""
    layers = config.vision.num_used_layers if name.startswith("vision.") else config.decoder.num_layers
    value = initial_value(name, shape, config.seed, layers)
    if config.latent_fan_in == "separate" and name.endswith("_adapter.fc1.weight"):
        num_latent = config.autoencoder.channels
        value[:, -num_latent:] *= math.sqrt(shape[1] / num_latent)
    return value


def initial_value(name: str, shape: torch.Size, seed: int, num_layers: int) -> Tensor:
    """float32 start value of a parameter that no checkpoint provides.

    Norms are 1, biases, the placeholder and the velocity head 0; embeddings N(0, 0.1²); other matrices N(0,
    1/fan_in), and those that write to the residual stream are scaled down by sqrt(2 * num_layers).
    """
    if name.startswith("velocity_head.") or name.endswith((".bias", "placeholder")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = EMBEDDING_STD if "embed" in name and "patch" not in name else 1.0 / math.sqrt(math.prod(shape[1:]))
    if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
        std /= math.sqrt(2 * num_layers)
    generator = torch.Generator().manual_seed(seed_of(seed, 0, name, "weight"))
    return torch.randn(shape, generator=generator) * std


def cloned_from(name: str, vision_layers: int, expert_layers: int) -> str | None:
    """The parameter that a new one starts as a copy of: the STEM expert is a clone of the versatile one (paper
    §2.1)."""
    prefix = "vision.stem_layers."
    if not name.startswith(prefix):
        return None
    index, rest = name.removeprefix(prefix).split(".", 1)
    return f"vision.layers.{vision_layers - expert_layers + int(index)}.{rest}"
