"""An export: one folder of plain files that loads without torch.distributed.

model.safetensors       float32 weights by parameter name
recipe.yaml             the recipe that made it, its paths pointing into this folder
meta.json               stage, step and where it came from
tokenizer.json, autoencoder/
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from emma_train.config import to_yaml
from emma_train.config.errors import UserError
from emma_train.config.files import write_atomic
from emma_train.config.schema import Recipe

WEIGHTS, RECIPE, META, TOKENIZER, AUTOENCODER = (
    "model.safetensors",
    "recipe.yaml",
    "meta.json",
    "tokenizer.json",
    "autoencoder",
)


def is_export(path: Path) -> bool:
    """Whether a folder is an export."""
    return (path / WEIGHTS).is_file() and (path / RECIPE).is_file()


def write(out: Path, model: nn.Module, recipe: Recipe, meta: dict[str, Any], tokenizer: Path) -> None:
    """Write an export of a whole model. Raises UserError where `out` holds something else."""
    if out.exists() and any(out.iterdir()) and not is_export(out):
        raise UserError(f"{out}: is not empty and not an export; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, out / TOKENIZER)
    if Path(recipe.model.autoencoder.path).resolve() != (out / AUTOENCODER).resolve():
        shutil.copytree(recipe.model.autoencoder.path, out / AUTOENCODER, dirs_exist_ok=True)
    recipe.model.autoencoder.path, recipe.data.tokenizer = AUTOENCODER, TOKENIZER
    write_atomic(out / RECIPE, to_yaml(recipe))
    write_atomic(
        out / META, json.dumps({k: meta[k] for k in ("stage", "step", "config_hash", "time")}, indent=1) + "\n"
    )
    weights = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})


def read_meta(folder: Path) -> dict[str, Any]:
    """Stage and step of an export."""
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    return meta


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names (model.NAME, as in checkpoints) and shapes of an export's tensors."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {f"model.{name}": tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def load_weights(folder: Path, names: dict[str, str], model: nn.Module) -> None:
    """Fill parameters from an export, one tensor at a time: `names` maps a parameter name to model.NAME."""
    parameters = dict(model.named_parameters())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, stored in names.items():
            parameter = parameters[name]
            value = file.get_tensor(stored.removeprefix("model.")).to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
