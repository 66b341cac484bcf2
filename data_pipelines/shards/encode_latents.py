"""Encodes every image of a shard folder with DC-AE and stores the latents. DC-AE never trains, so once is enough."""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipelines.shards.images import DECODING, image_members, load_resized
from data_pipelines.shards.index import read_manifest, shard_url
from data_pipelines.shards.latents import is_current, latents_metadata, latents_path, transform_name
from data_pipelines.shards.tar import crc32, groups
from emma_train.config.schema import AutoencoderConfig, ImageConfig
from emma_train.model.autoencoder import Autoencoder
from emma_train.storage.files import make_folder, write_atomic

log = logging.getLogger(__name__)
_T = TypeVar("_T")
AT_ONCE = 16
"""Number of batches of images that are loaded before the encoder runs, so that images of one size form batches."""


def cache_latents(
    folder: Path,
    autoencoder: AutoencoderConfig,
    image_configs: list[ImageConfig],
    device: torch.device,
    rank: int = 0,
    size: int = 1,
    dtype: str = "float16",
) -> int:
    """Write the latents of each shard beside it, one file per transform; returns the number of images encoded.

    Process `rank` of `size` takes every size-th shard. A current file is kept, of either type, unless one of its
    latents is damaged. With `dtype` float32, cached and online encoding give the same numbers; float16 takes half of
    the space and rounds to 11 bits. Raises UserError.
    """
    encoder = Autoencoder(autoencoder, device)
    manifest = read_manifest(folder)
    num = 0
    for shard in manifest["shards"][rank::size]:
        tar = Path(shard_url(folder, shard))
        for image_config in {transform_name(i): i for i in image_configs}.values():
            path = Path(latents_path(tar, transform_name(image_config)))
            metadata = _intact_metadata(path) if path.is_file() else {}
            if is_current(metadata, encoder.fingerprint, shard["sha256"]) and metadata.get("decoding") == str(DECODING):
                continue
            make_folder(path.parent)
            latents: dict[str, np.ndarray] = {}
            for images in _batches(_images(tar, image_config, autoencoder.pixels), AT_ONCE * autoencoder.chunk):
                encoded = encoder.encode([image for _, image in images])
                for (name, _), latent in zip(images, encoded, strict=True):
                    latents[name] = latent.cpu().to(getattr(torch, dtype)).numpy()
            _leave_out_infinite(latents, tar)
            # Not safetensors' save_file: its files can be read by their owner alone, and on a full disk it raises no
            # OSError.
            write_atomic(path, save(latents, latents_metadata(encoder.fingerprint, shard["sha256"], latents)))
            num += len(latents)
            log.info("%s: %d images", path, len(latents))
    return num


def _leave_out_infinite(latents: dict[str, np.ndarray], tar: Path) -> None:
    """Remove latents with values that are not finite, or too large for their type, and log them."""
    for name in [name for name, latent in latents.items() if not np.isfinite(latent).all()]:
        log.warning("%s: the latent of %s has values that are not finite as %s", tar, name, latents.pop(name).dtype)


def _images(tar: Path, image_config: ImageConfig, pixels: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(key/name, pixels) of every image of a shard, resized as in training. Logs and skips broken images."""
    with open(tar, "rb") as file:
        for group in groups(file):
            for name, data in image_members(group.members).items():
                try:
                    loaded = load_resized(data, image_config, pixels)
                except (OSError, ValueError, SyntaxError) as error:
                    log.warning("%s: image %s of %s cannot be read (%s)", tar, name, group.key, error)
                    continue
                yield f"{group.key}/{name}", torch.from_numpy(loaded)


def _batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(islice(items, size)):
        yield batch


def _intact_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file of latents; empty where the file is incomplete or a latent differs from its checksum."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            checksums = json.loads(metadata.get("crc32", "{}"))
            damaged = [n for n in file.keys() if crc32(file.get_tensor(n).tobytes()) != checksums.get(n)]  # noqa: SIM118
    except (AttributeError, SafetensorError, ValueError):
        return {}
    if damaged:
        log.warning("%s: the latent of %s is damaged; the file is written anew", path, damaged[0])
    return {} if damaged else metadata
