"""An export: one folder of plain files that loads without torch.distributed.

model.safetensors       weights by parameter name, in float32 or as they were imported
recipe.yaml             the recipe that made it, its paths pointing into this folder
meta.json               stage, step and where it came from
generation.json         how it generates (generate/settings.py)
tokenizer.json, autoencoder/
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from emma_train.config import to_yaml
from emma_train.config.schema import Recipe
from emma_train.engine.flat_shard import local_chunks
from emma_train.errors import UserError
from emma_train.model import autoencoder
from emma_train.storage import safetensors_io as tensors
from emma_train.storage.files import write_atomic
from emma_train.storage.paths import StoragePath, there
from emma_train.storage.safetensors_io import Spec, Tensors

WEIGHTS, RECIPE, META, TOKENIZER, AUTOENCODER = (
    "model.safetensors",
    "recipe.yaml",
    "meta.json",
    "tokenizer.json",
    "autoencoder",
)

TOKENIZER_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def is_export(path: StoragePath) -> TypeGuard[Path]:
    """Whether a folder is an export. Raises UserError where it lies in a store."""
    found = there(path / WEIGHTS) and there(path / RECIPE)
    if found and not isinstance(path, Path):
        raise UserError(f"{path}: an export is read from a folder; copy it to one")
    return found


def check_free(out: Path) -> None:
    """Raise UserError where an export must not be written: `out` holds something else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not is_export(out):
        raise UserError(f"{out}: is not empty and not an export; name a new folder")


def write(
    out: Path,
    specs: Mapping[str, Spec],
    value: Callable[[str], Tensor],
    recipe: Recipe,
    meta: dict[str, Any],
    tokenizer: Path,
) -> None:
    """Write an export whose tensors `value` gives one by one, by parameter name. Raises UserError where `out` holds
    something else."""
    check_free(out)
    out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(tokenizer, out)
    source = Path(recipe.model.autoencoder.path)
    if source.resolve() != (out / AUTOENCODER).resolve():
        _copy_autoencoder(source, out / AUTOENCODER)
    recipe = copy.deepcopy(recipe)
    recipe.model.autoencoder.path, recipe.data.tokenizer = AUTOENCODER, TOKENIZER
    write_atomic(out / RECIPE, to_yaml(recipe))
    kept = {k: meta[k] for k in ("stage", "step", "config_hash", "time", "sources") if k in meta}
    write_atomic(out / META, json.dumps(kept, indent=1) + "\n")
    tensors.write(out / WEIGHTS, specs, value)


def copy_tokenizer(tokenizer: Path, out: Path) -> None:
    """tokenizer.json, and what transformers keeps beside it where that is there."""
    if tokenizer.parent.resolve() == out.resolve() and tokenizer.name == TOKENIZER:
        return
    shutil.copyfile(tokenizer, out / TOKENIZER)
    for name in TOKENIZER_BESIDE:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, out / name)


def read_meta(folder: Path) -> dict[str, Any]:
    """Stage and step of an export."""
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    return meta


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names (model.NAME, as in checkpoints) and shapes of an export's tensors."""
    return {f"model.{name}": shape for name, shape in Tensors(folder).shapes.items()}


@torch.no_grad()
def load_weights(folder: Path, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from an export: `names` maps a weight's name to model.NAME. A rank reads its own slices only."""
    stored = Tensors(folder)
    for name, source in names.items():
        for place, own in local_chunks(weights[name]):
            own.copy_(stored.read(source.removeprefix("model."), place))


def _copy_autoencoder(source: Path, target: Path) -> None:
    """config.json and the weights, as one file even where they were several."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    if (source / autoencoder.WEIGHTS).is_file():
        shutil.copyfile(source / autoencoder.WEIGHTS, target / autoencoder.WEIGHTS)
    else:
        weights = Tensors(source, autoencoder.STEM)
        tensors.write(target / autoencoder.WEIGHTS, weights.specs, weights.read)
