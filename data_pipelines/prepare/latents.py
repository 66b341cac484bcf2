"""DC-AE latents of every picture of a shard folder, computed once: it never trains, so they never change."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_pipelines.stream.index import read_manifest
from data_pipelines.stream.latents import fits, latents_of, metadata_of, transform_name
from data_pipelines.stream.pictures import load_picture, open_picture, pictures_of
from data_pipelines.stream.tar import groups
from emma_train.config.schema import AutoencoderConfig, ImageConfig
from emma_train.model.autoencoder import Autoencoder
from emma_train.sequence.geometry import picture_size

log = logging.getLogger(__name__)
Item = TypeVar("Item")
AT_ONCE = 16
"""Batches of the encoder that are decoded before it runs, so that pictures of one size find each other."""


def cache_latents(
    folder: Path,
    autoencoder: AutoencoderConfig,
    images: list[ImageConfig],
    device: torch.device,
    rank: int = 0,
    size: int = 1,
) -> int:
    """Write the latents of each shard beside it, one file per transform; returns the number of pictures encoded.

    Of `size` processes each takes every size-th shard; they need not know of each other.

    A file that is of this autoencoder already is kept. float32, so that cached and online encoding agree. Raises
    UserError.
    """
    encoder = Autoencoder(autoencoder, device)
    manifest = read_manifest(folder)
    num = 0
    for shard in manifest["shards"][rank::size]:
        tar = folder / shard["name"]
        for image in {transform_name(i): i for i in images}.values():
            path = Path(latents_of(tar, transform_name(image)))
            if path.is_file() and fits(_metadata(path), encoder.fingerprint, shard["sha256"]):
                continue
            latents: dict[str, np.ndarray] = {}
            for pictures in _batches(_pictures(tar, image, autoencoder.pixels), AT_ONCE * autoencoder.chunk):
                encoded = encoder.encode([picture for _, picture in pictures])
                latents |= {name: latent.cpu().numpy() for (name, _), latent in zip(pictures, encoded, strict=True)}
            beside = path.with_name(path.name + ".tmp")
            save_file(latents, beside, metadata_of(encoder.fingerprint, shard["sha256"], latents))
            beside.replace(path)
            num += len(latents)
            log.info("%s: %d pictures", path, len(latents))
    return num


def _pictures(tar: Path, image: ImageConfig, pixels: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every picture of a shard as the stream will show it; those that cannot be decoded are told and passed over."""
    with open(tar, "rb") as file:
        for group in groups(file):
            for name, data in pictures_of(group.members).items():
                try:
                    with open_picture(data) as picture:
                        pixels_of_it = load_picture(picture, *picture_size(*picture.size, image, pixels))
                except (OSError, ValueError, SyntaxError) as error:
                    log.warning("%s: picture %s of %s cannot be read (%s)", tar, name, group.key, error)
                    continue
                yield f"{group.key}/{name}", torch.from_numpy(pixels_of_it.copy())


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError:  # a torn copy
        return {}
