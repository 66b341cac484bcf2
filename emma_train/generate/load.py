"""A model to be asked, in one process without torch.distributed: from a checkpoint or a run folder."""

from pathlib import Path
from typing import Any

import torch

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import store
from emma_train.config.errors import UserError
from emma_train.config.load import from_dict
from emma_train.config.schema import Recipe
from emma_train.engine.world import pick_device
from emma_train.generate.generator import Generator
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import Emma
from emma_train.sequence.tokens import TextTokenizer


def load_generator(path: str | Path, device: str = "auto", use_ema: bool = True) -> tuple[Generator, Recipe, dict[str, Any]]:
    """Generator, recipe and metadata of the newest checkpoint at `path`. Raises UserError."""
    checkpoint = folders.resolve(path, "MODEL")
    meta = folders.whole(checkpoint)
    assert meta is not None
    recipe = from_dict(meta["config"], str(checkpoint))
    target = torch.device(pick_device(device))
    model = load_model(checkpoint, recipe, target, use_ema)
    autoencoder = Autoencoder(recipe.model.autoencoder, target)
    vision = recipe.model.vision
    generator = Generator(model, autoencoder, TextTokenizer(recipe.data.tokenizer), vision.patch, vision.shuffle)
    return generator, recipe, meta


def load_model(checkpoint: Path, recipe: Recipe, device: torch.device, use_ema: bool) -> Emma:
    """The whole model in float32, with averaged weights where wanted and stored. Raises UserError."""
    with torch.device("meta"):
        model = Emma(recipe.model)
    model.to_empty(device=device)
    stored = store.tensors(checkpoint)
    names = {}
    for name, _ in model.named_parameters():
        averaged = f"ema.{name}"
        names[name] = averaged if use_ema and averaged in stored else f"model.{name}"
        if names[name] not in stored:
            raise UserError(f"{checkpoint}: lacks model.{name}; it is not a whole EMMA checkpoint")
    store.load_weights(checkpoint, names, model)
    return model.eval()
