"""Loads a model for generation, in one process without torch.distributed, from a run folder, checkpoint or export."""

from pathlib import Path
from typing import Any

import torch

from emma_train.config.schema import Recipe
from emma_train.engine.world import pick_device
from emma_train.export.content import check_content, content_hashes
from emma_train.export.stored_model import StoredModel
from emma_train.generate.generator import Generator
from emma_train.model.autoencoder import Autoencoder, fingerprint
from emma_train.model.emma import Emma
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.paths import StoragePath


def load_generator(
    path: str | StoragePath,
    device: str = "auto",
    use_ema: bool = True,
    precision: str = "auto",
    use_experts: bool = True,
) -> tuple[Generator, Recipe, dict[str, Any]]:
    """Generator, recipe and metadata of the newest checkpoint at `path`, or of an export. Raises UserError.

    `precision` is that of the weights: bf16, fp32, or auto, bf16 on a GPU and fp32 on CPUs. The autoencoder keeps fp32.
    Without `use_experts` every image takes the versatile encoder, as in the paper's comparison (79.2 without, 79.6
    with the STEM expert, as the mean of eleven benchmarks).
    """
    target = torch.device(pick_device(device))
    model, recipe, meta = load_model(path, target, use_ema, weight_type(precision, target))
    if not use_experts:
        model.vision.router = None  # what it says is the only way to the expert
    vision = recipe.model.vision
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    check_content(meta, content_hashes(tokenizer, fingerprint(Path(recipe.model.autoencoder.path))), str(path))
    autoencoder = Autoencoder(recipe.model.autoencoder, target)
    rules = image_rules(recipe.model)
    return Generator(model, autoencoder, tokenizer, vision.patch, vision.shuffle, rules=rules), recipe, meta


def weight_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of a model's weights in generation: auto is bf16 on a GPU, where it halves memory, and fp32 on CPUs."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def load_model(
    path: str | StoragePath, device: torch.device, use_ema: bool, dtype: torch.dtype = torch.float32
) -> tuple[Emma, Recipe, dict[str, Any]]:
    """The complete model, with averaged weights if asked for and stored. Raises UserError."""
    stored = StoredModel(path, use_ema)
    with torch.device("meta"):
        model = Emma(stored.recipe.model).to(dtype)
    model.to_empty(device=device)
    stored.load(model)
    return model.eval(), stored.recipe, stored.meta
