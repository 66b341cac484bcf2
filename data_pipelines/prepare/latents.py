"""DC-AE latents of every picture of a shard folder, computed once: it never trains, so they never change."""

import io
import logging
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipelines.stream.index import groups, picture_names, read_manifest
from data_pipelines.stream.reader import latents_path, load_picture, transform_name
from emma_train.config.schema import AutoencoderConfig, ImageConfig
from emma_train.model.autoencoder import Autoencoder
from emma_train.sequence.geometry import picture_size

log = logging.getLogger(__name__)


def cache_latents(folder: Path, autoencoder: AutoencoderConfig, images: list[ImageConfig], device: torch.device) -> int:
    """Write the latents of each shard beside it, one file per transform; returns the number of pictures encoded.

    A file that is of this autoencoder already is kept. float32, so that cached and online encoding agree. Raises
    UserError.
    """
    encoder = Autoencoder(autoencoder, device)
    manifest = read_manifest(folder)
    num = 0
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        for image in {transform_name(i): i for i in images}.values():
            path = latents_path(tar, transform_name(image))
            tag = {"autoencoder": encoder.fingerprint, "shard_sha256": shard["sha256"]}
            if path.is_file() and _metadata(path) == tag:
                continue
            names, pictures = [], []
            with open(tar, "rb") as file:
                for group in groups(file):
                    for name in picture_names(group.members):
                        with Image.open(io.BytesIO(group.members[name])) as picture:
                            size = picture_size(*picture.size, image, autoencoder.pixels)
                            pictures.append(torch.from_numpy(load_picture(picture, *size).copy()))
                        names.append(f"{group.key}/{name.partition('.')[0]}")
            latents = [latent.cpu() for latent in encoder.encode(pictures)]
            beside = path.with_name(path.name + ".tmp")
            save_file(dict(zip(names, latents, strict=True)), beside, metadata=tag)
            beside.replace(path)
            num += len(pictures)
            log.info("%s: %d pictures", path, len(pictures))
    return num


def _metadata(path: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()
