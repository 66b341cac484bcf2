"""A model to be asked, in one process without torch.distributed: from a run folder, a checkpoint or an export."""

from pathlib import Path
from typing import Any

import torch

from emma_train.checkpoint import export, store
from emma_train.checkpoint import folder as folders
from emma_train.config.errors import UserError
from emma_train.config.load import from_dict, load_yaml
from emma_train.config.schema import Recipe
from emma_train.engine.world import pick_device
from emma_train.generate.generator import Generator
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.emma import Emma
from emma_train.sequence.tokens import TextTokenizer


def load_generator(
    path: str | Path, device: str = "auto", use_ema: bool = True
) -> tuple[Generator, Recipe, dict[str, Any]]:
    """Generator, recipe and metadata of the newest checkpoint at `path`, or of an export. Raises UserError."""
    model, recipe, meta = load_model(path, torch.device(pick_device(device)), use_ema)
    autoencoder = Autoencoder(recipe.model.autoencoder, torch.device(pick_device(device)))
    vision = recipe.model.vision
    generator = Generator(model, autoencoder, TextTokenizer(recipe.data.tokenizer), vision.patch, vision.shuffle)
    return generator, recipe, meta


def load_model(path: str | Path, device: torch.device, use_ema: bool) -> tuple[Emma, Recipe, dict[str, Any]]:
    """The whole model in float32, with averaged weights where wanted and stored. Raises UserError."""
    folder = Path(path)
    exported = export.is_export(folder)
    if exported:
        recipe, meta = from_dict(load_yaml(folder / export.RECIPE), str(folder)), export.read_meta(folder)
        recipe.model.autoencoder.path = str(folder / recipe.model.autoencoder.path)
        recipe.data.tokenizer = str(folder / recipe.data.tokenizer)
    else:
        folder = folders.resolve(newest_stage(folder), "MODEL")
        found = folders.whole(folder)
        assert found is not None
        meta, recipe = found, from_dict(found["config"], str(folder))
    with torch.device("meta"):
        model = Emma(recipe.model)
    model.to_empty(device=device)
    stored = export.shapes(folder) if exported else store.tensors(folder)
    names = {}
    for name, _ in model.named_parameters():
        averaged = f"ema.{name}"
        names[name] = averaged if use_ema and averaged in stored else f"model.{name}"
        if names[name] not in stored:
            raise UserError(f"{folder}: lacks {name}; it is not a whole EMMA model")
    (export if exported else store).load_weights(folder, names, dict(model.named_parameters()))
    return model.eval(), recipe, meta


def newest_stage(path: Path) -> Path:
    """The furthest stage of a pipeline's run folder that has a checkpoint; any other path as it is."""
    stages = [p for p in path.glob("stage*") if (p / "checkpoints" / folders.LATEST).is_file()] if path.is_dir() else []
    return max(stages, key=lambda p: p.name) if stages else path


def export_checkpoint(path: str | Path, out: Path, use_ema: bool) -> Path:
    """Write what `path` holds as an export. Raises UserError."""
    model, recipe, meta = load_model(path, torch.device("cpu"), use_ema)
    export.write(out, model, recipe, meta, TextTokenizer(recipe.data.tokenizer).path)
    return out
