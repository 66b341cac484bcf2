"""Gen-Enc: DC-AE (diffusers' AutoencoderDC), frozen in every stage and always in float32 (`set_float32_precision` says
how exact that is): bf16 can give NaN (Sana #96)."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emma_train.config.schema import AutoencoderConfig
from emma_train.errors import UserError, describe_shortage
from emma_train.storage.safetensors_io import read_json

log = logging.getLogger(__name__)
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS = f"{WEIGHTS_STEM}.safetensors"


class Autoencoder:
    """Images <-> latents. Not a torch Module on purpose: no optimizer, wrapper or checkpoint can take hold of it."""

    def __init__(self, config: AutoencoderConfig, device: torch.device, load: bool = True) -> None:
        """`load` False leaves the weights on the disk until they are needed: never, where all latents are cached.
        Raises UserError where the folder is not a DC-AE of the recipe's shape."""
        folder = Path(config.path)
        self.config, self.device = config, device
        self.fingerprint = fingerprint(folder)
        stored = autoencoder_config(folder, config.chunk)
        if (stored.channels, stored.pixels) != (config.channels, config.pixels):
            raise UserError(
                f"model.autoencoder.path {folder}: has {stored.channels} channels at {stored.pixels}x, but the recipe "
                f"says {config.channels} at {config.pixels}x"
            )
        self.scale = scaling_factor(folder)
        set_float32_precision()
        if load:
            _ = self._model

    @cached_property
    def _model(self) -> Any:
        from diffusers import AutoencoderDC

        log.info("loading the autoencoder")
        with loading(Path(self.config.path)):
            model, info = AutoencoderDC.from_pretrained(
                self.config.path,
                torch_dtype=torch.float32,
                local_files_only=True,
                low_cpu_mem_usage=False,
                use_safetensors=True,  # the other format is a pickle
                output_loading_info=True,
            )
            if missing := info["missing_keys"]:  # diffusers gives these random values, and only warns
                raise ValueError(f"{len(missing)} weights are missing, such as {sorted(missing)[0]}")
        return model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """uint8 [H, W, 3] images of any sizes -> unscaled latents, each float32 [rows*columns, channels] in raster
        order."""
        latents: list[Tensor | None] = [None] * len(images)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(tuple(image.shape), []).append(index)
        for indices in by_size.values():
            for start in range(0, len(indices), self.config.chunk):
                part = indices[start : start + self.config.chunk]
                pixels = torch.stack([images[i] for i in part]).to(self.device)
                encoded = self._model.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).latent
                for i, latent in zip(part, encoded, strict=True):
                    latents[i] = latent.flatten(1).T.contiguous()
        return [latent for latent in latents if latent is not None]

    @torch.no_grad()
    def decode(self, latent: Tensor, rows: int, columns: int) -> Tensor:
        """Unscaled latent [rows*columns, channels] -> uint8 [H, W, 3]."""
        grid = latent.float().T.reshape(1, -1, rows, columns).to(self.device)
        pixels = self._model.decode(grid).sample[0].permute(1, 2, 0)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def set_float32_precision() -> None:
    """Set what float32 means on a GPU, whatever torch's defaults are: convolutions, which DC-AE alone has, round their
    inputs to TF32 (10 bits of mantissa); matrix products do not.

    Ours: TF32 moves latents by about 1e-3, at a standard deviation of about 1, and float32 convolutions would take some
    three times as long. So latents that were cached on a CPU differ from those of a GPU by as much.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


def scaling_factor(folder: Path) -> float:
    """By which latents are multiplied, from a folder's config.json; 1, as in diffusers, where it says nothing. Raises
    UserError."""
    value = read_json(folder / "config.json").get("scaling_factor", 1.0)
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{folder / 'config.json'}: scaling_factor is {value!r}, no positive number; copy it again")
    return float(value)


def autoencoder_config(folder: Path, chunk: int) -> AutoencoderConfig:
    """The config of a DC-AE folder with the channels and pixels per latent that its config.json says, or diffusers'
    defaults where it says nothing. Raises UserError."""
    values = read_json(folder / "config.json")
    channels, blocks = values.get("latent_channels", 32), values.get("encoder_block_out_channels", [0] * 6)
    if not isinstance(channels, int) or not isinstance(blocks, list) or not 0 < len(blocks) < 12:
        raise UserError(f"{folder / 'config.json'}: is no AutoencoderDC's; copy or download it again")
    return AutoencoderConfig(path=str(folder), channels=channels, pixels=2 ** (len(blocks) - 1), chunk=chunk)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn what diffusers raises on files that it does not understand into a UserError."""
    try:
        yield
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if describe_shortage(error) is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: config.json and {WEIGHTS} are no AutoencoderDC ({type(error).__name__}: {reason}); copy or "
            "download them again"
        ) from None


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits of a DC-AE folder's config and weights. Raises UserError where files are missing."""
    for name in ("config.json", WEIGHTS):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{folder / name}: cannot read the autoencoder ({error.strerror}); set model.autoencoder.path"
            ) from None
    # The version of diffusers that wrote it changes no latent.
    values = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + content).hexdigest()[:16]
