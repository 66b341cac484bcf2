"""An initial export from public Hugging Face folders: both branches from one LLM, SigLIP2 as the vision encoder, DC-AE
as the autoencoder, and all other weights from the seed."""

import dataclasses
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from emma_train.config import config_hash
from emma_train.config.check import check_model
from emma_train.config.load import from_dict
from emma_train.config.schema import AutoencoderConfig, DecoderConfig, Recipe, VisionConfig
from emma_train.errors import UserError
from emma_train.export import export
from emma_train.export import hf_names as hf
from emma_train.model.autoencoder import WEIGHTS_STEM, loading
from emma_train.model.emma import Emma
from emma_train.model.initial import start_value
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.safetensors_io import Spec, Tensors, read_json

log = logging.getLogger(__name__)
CONFIG_FILE = "config.json"


def import_pretrained(
    out: Path, llm: Path, vision: Path, autoencoder: Path, tokenizer: Path, overrides: list[str] | None = None
) -> Path:
    """Write an initial export to `out`, one tensor at a time. Returns `out`.

    `overrides` set what the folders do not determine, such as model.decoder.num_shared_layers=12. Raises UserError,
    before anything is written, if a folder holds another model or is incomplete.
    """
    export.check_free(out)
    text = TextTokenizer(tokenizer)
    recipe = _recipe(out.name, llm, vision, autoencoder, text, overrides or [])
    sources = {hf.LLM: (llm, Tensors(llm)), hf.VISION: (vision, Tensors(vision))}
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Emma(recipe.model).named_parameters()}
    prefixes = {part: hf.prefix_of(part, tensors.specs) for part, (_, tensors) in sources.items()}
    origins = {name: stored for name in shapes if (stored := hf.stored_name(name, prefixes)) is not None}
    for part, (folder, tensors) in sources.items():
        wanted = {key: shapes[name] for name, (owner, key) in origins.items() if owner == part}
        prefix, config = prefixes[part], recipe.model
        used = {k: s for k, s in tensors.shapes.items() if not hf.is_ignored(part, k, prefix, config)}
        hf.check_shapes(wanted, used, str(folder))
        _check_finite(folder, tensors, wanted)

    def value(name: str) -> Tensor:
        if name not in origins:
            return start_value(name, torch.Size(shapes[name]), recipe.model)
        part, key = origins[name]
        return sources[part][1].read(key)

    specs = {name: Spec("F32", shape) for name, shape in shapes.items()}
    specs |= {name: sources[part][1].specs[key] for name, (part, key) in origins.items()}
    meta = {"stage": "", "step": 0, "config_hash": config_hash(recipe), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    meta["sources"] = {"llm": str(llm), "vision": str(vision), "autoencoder": str(autoencoder)}
    export.write_export(out, specs, value, recipe, meta, text.path)
    size = sum(spec.num_bytes for spec in specs.values()) / 1e9
    log.info("%d tensors from %s and %s, %d new; %.3f GB", len(origins), llm, vision, len(shapes) - len(origins), size)
    return out


def _check_finite(folder: Path, tensors: Tensors, names: Iterable[str]) -> None:
    """Raise UserError where a tensor holds whole numbers, or a value that is not finite."""
    for name in names:
        tensor = tensors.read(name)
        if not tensor.is_floating_point():
            raise UserError(f"{folder}: {name} is of type {tensors.specs[name].dtype}, not of floats")
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN if one value is; no copy of the tensor
            raise UserError(f"{folder}: {name} holds values that are not finite")


def _recipe(
    name: str, llm: Path, vision: Path, autoencoder: Path, tokenizer: TextTokenizer, overrides: list[str]
) -> Recipe:
    """A recipe without a stage that describes the model."""
    encoder = hf.vision_config(read_json(vision / CONFIG_FILE), str(vision / CONFIG_FILE))
    decoder = hf.decoder_config(read_json(llm / CONFIG_FILE), str(llm / CONFIG_FILE))
    latents = _autoencoder_config(autoencoder)
    encoder.shuffle, rest = divmod(latents.pixels, encoder.patch)
    if rest:
        raise UserError(
            f"{autoencoder}: {latents.pixels} pixels per latent are not a multiple of the encoder's patch of "
            f"{encoder.patch} ({vision}); their grids cannot be fused"
        )
    if tokenizer.vocab > decoder.vocab:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab} tokens, more than the {decoder.vocab} of {llm / CONFIG_FILE}"
        )
    sizes: dict[str, VisionConfig | DecoderConfig | AutoencoderConfig]
    sizes = {"vision": encoder, "decoder": decoder, "autoencoder": latents}
    image = {"side": encoder.position_grid * encoder.patch}
    values = {
        "run": {"name": name},
        "stage": {"name": ""},
        "model": {key: dataclasses.asdict(config) for key, config in sizes.items()},
        "data": {"tokenizer": str(tokenizer.path), "samples_per_step": 0, "und": image, "gen": image},
        "optimizer": {"lr": 0.0},
        "train": {"steps": 0},
    }
    recipe = from_dict(values, "import", overrides)
    check_model(recipe, "import")
    return recipe


def _autoencoder_config(folder: Path) -> AutoencoderConfig:
    """The config of an AutoencoderDC folder, after its weights were compared with its config.json. Raises UserError."""
    from diffusers import AutoencoderDC

    values = read_json(folder / CONFIG_FILE)
    if values.get("_class_name") != "AutoencoderDC":
        raise UserError(f"{folder / CONFIG_FILE}: is a {values.get('_class_name')}; EMMA needs an AutoencoderDC")
    with loading(folder), torch.device("meta"):
        model = AutoencoderDC.from_config(values)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    hf.check_shapes(wanted, Tensors(folder, WEIGHTS_STEM).shapes, str(folder))
    return AutoencoderConfig(str(folder), int(model.config.latent_channels), int(model.spatial_compression_ratio))
