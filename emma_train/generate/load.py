"""Loads a model for generation, in one process without torch.distributed, from a run folder, checkpoint or export."""

from typing import Any

import torch

from emma_train.config.schema import Recipe
from emma_train.engine.world import pick_device
from emma_train.export.stored_model import StoredModel
from emma_train.generate.generator import Generator
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import Emma
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.paths import StoragePath


def load_generator(
    path: str | StoragePath, device: str = "auto", use_ema: bool = True
) -> tuple[Generator, Recipe, dict[str, Any]]:
    """Generator, recipe and metadata of the newest checkpoint at `path`, or of an export. Raises UserError."""
    model, recipe, meta = load_model(path, torch.device(pick_device(device)), use_ema)
    autoencoder = Autoencoder(recipe.model.autoencoder, torch.device(pick_device(device)))
    vision = recipe.model.vision
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    return Generator(model, autoencoder, tokenizer, vision.patch, vision.shuffle), recipe, meta


def load_model(path: str | StoragePath, device: torch.device, use_ema: bool) -> tuple[Emma, Recipe, dict[str, Any]]:
    """The complete model in float32, with averaged weights if asked for and stored. Raises UserError."""
    stored = StoredModel(path, use_ema)
    with torch.device("meta"):
        model = Emma(stored.recipe.model)
    model.to_empty(device=device)
    stored.load(model)
    return model.eval(), stored.recipe, stored.meta
