"""An export: one local folder of plain files that loads without torch.distributed.

model.safetensors       weights by parameter name, in float32 or in the type in which they were imported
recipe.yaml             the recipe that made it, with paths into this folder
meta.json               stage, step, origin, and the hashes of the two; written last
generation.json         how it generates (generate/settings.py)
tokenizer.json, autoencoder/
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.verify import file_entry
from emma_train.config import to_yaml
from emma_train.config.schema import Recipe
from emma_train.engine.flat_shard import local_chunks
from emma_train.errors import UserError
from emma_train.export.content import CONTENT, content_hashes
from emma_train.model import autoencoder
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.files import make_folder, write_atomic
from emma_train.storage.paths import StoragePath, as_local, storage_of
from emma_train.storage.protocol import META
from emma_train.storage.safetensors_io import Spec, Tensors, read_json, write_safetensors
from emma_train.storage.urls import is_inner_path

WEIGHTS_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that transformers keeps beside tokenizer.json."""
AUTOENCODER_FOLDER = "autoencoder"
EXPORTED_META = ("stage", "step", "config_hash", "time", "sources", "tracker_run")
"""What an export keeps of a checkpoint's metadata."""


def is_export(path: StoragePath) -> TypeGuard[Path]:
    """Whether a folder is an export. Raises UserError where it lies in an object store or is incomplete."""
    exists = storage_of(path).exists
    missing = [name for name in (WEIGHTS_FILE, RECIPE_FILE) if not exists(path / name)]
    if len(missing) == 1 and exists(path / META):
        raise UserError(f"{path / missing[0]}: missing from this export; copy it there again, or export again")
    if missing:
        return False
    if as_local(path) is None:
        raise UserError(f"{path}: an export is read from a local folder; copy it to one")
    return True


def check_free(out: Path) -> None:
    """Raise UserError where `out` holds something other than an export, which must not be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not is_export(out):
        raise UserError(f"{out}: is not empty and not an export; name a new folder")


def write_export(
    out: Path,
    specs: Mapping[str, Spec],
    value: Callable[[str], Tensor],
    recipe: Recipe,
    meta: dict[str, Any],
    tokenizer: Path,
) -> None:
    """Write an export; `value` gives its tensors one at a time by parameter name. Raises UserError where `out` holds
    something else."""
    check_free(out)
    make_folder(out)
    copy_tokenizer(tokenizer, out)
    source = Path(recipe.model.autoencoder.path)
    if source.resolve() != (out / AUTOENCODER_FOLDER).resolve():
        _copy_autoencoder(source, out / AUTOENCODER_FOLDER)
    recipe = copy.deepcopy(recipe)
    recipe.model.autoencoder.path = AUTOENCODER_FOLDER
    recipe.data.tokenizer = TOKENIZER_FILE
    write_atomic(out / RECIPE_FILE, to_yaml(recipe))
    kept: dict[str, Any] = {k: meta[k] for k in EXPORTED_META if k in meta}
    fingerprint = autoencoder.fingerprint(out / AUTOENCODER_FOLDER)
    kept[CONTENT] = content_hashes(TextTokenizer(out / TOKENIZER_FILE), fingerprint)
    write_safetensors(out / WEIGHTS_FILE, specs, value)
    kept["files"] = {name: file_entry(out / name) for name in (WEIGHTS_FILE, RECIPE_FILE)}
    write_atomic(out / META, folders.with_checksum(kept) + "\n")


def locate_parts(recipe: Recipe, folder: Path) -> None:
    """Make the paths that an export's recipe names paths of this machine. Raises UserError where one leaves the
    folder."""
    paths = {"model.autoencoder.path": recipe.model.autoencoder.path, "data.tokenizer": recipe.data.tokenizer}
    for key, path in paths.items():
        if not is_inner_path(path):
            raise UserError(f"{folder / RECIPE_FILE}: {key} is {path!r}, outside the export; do not trust it")
    recipe.model.autoencoder.path = str(folder / recipe.model.autoencoder.path)
    recipe.data.tokenizer = str(folder / recipe.data.tokenizer)


def copy_tokenizer(tokenizer: Path, out: Path) -> None:
    """Copy tokenizer.json, and the files of transformers beside it that exist."""
    if tokenizer.parent.resolve() == out.resolve() and tokenizer.name == TOKENIZER_FILE:
        return
    shutil.copyfile(tokenizer, out / TOKENIZER_FILE)
    for name in TOKENIZER_EXTRAS:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, out / name)


def read_export_meta(folder: Path) -> dict[str, Any]:
    """Stage, step and origin of an export whose weights and recipe are intact to the byte. Exports of version 0.2 and
    older have no hashes of them, and are not compared. Raises UserError."""
    meta = read_json(folder / META)
    checksum, files = meta.pop("checksum", None), meta.get("files", {})
    if checksum is not None and checksum != folders.checksum(meta):
        raise UserError(f"{folder / META}: is damaged; copy it there again, or export again")
    if not (isinstance(meta.get("stage"), str) and isinstance(meta.get("step"), int) and isinstance(files, dict)):
        raise UserError(f"{folder / META}: does not tell stage and step of an export; copy it there again")
    for name in files.keys() & {WEIGHTS_FILE, RECIPE_FILE}:
        if _file_entry(folder / name, (folder / name).stat().st_mtime_ns) != files[name]:
            raise UserError(f"{folder / name}: is not what was exported; copy it there again, or export again")
    return meta


@cache
def _file_entry(path: Path, mtime_ns: int) -> dict[str, Any]:
    """Size and hash of a file; the argument `mtime_ns` makes a file that was written again be read again."""
    return file_entry(path)


def export_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an export's tensors by name (model.NAME, as in checkpoints)."""
    return {f"model.{name}": shape for name, shape in Tensors(folder).shapes.items()}


@torch.no_grad()
def load_export_weights(folder: Path, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Fill weights from an export; `names` maps a weight's name to model.NAME. A rank reads its slices only."""
    stored = Tensors(folder)
    for name, source in names.items():
        for index, chunk in local_chunks(weights[name]):
            chunk.copy_(stored.read(source.removeprefix("model."), index))


def _copy_autoencoder(source: Path, target: Path) -> None:
    """Copy config.json and the weights, into one file even where they are in several."""
    target.mkdir(exist_ok=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    if (source / autoencoder.WEIGHTS).is_file():
        shutil.copyfile(source / autoencoder.WEIGHTS, target / autoencoder.WEIGHTS)
    else:
        weights = Tensors(source, autoencoder.WEIGHTS_STEM)
        write_safetensors(target / autoencoder.WEIGHTS, weights.specs, weights.read)
