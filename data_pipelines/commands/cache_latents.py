"""Encode every image once; under torchrun the processes share the shards."""

import argparse
import os
from pathlib import Path

from data_pipelines.commands.common_arguments import shard_folders
from emma_train.errors import UserError, check_range

RANK_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""Environment variables that torchrun sets, and their values without torchrun."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder of a diffusers AutoencoderDC")
    modes = ("square", "crop", "native", "buckets")
    parser.add_argument("--mode", choices=modes, default="square", help="as in the recipe")
    parser.add_argument("--side", type=int, nargs="+", default=[512], help="as in the recipe; several are allowed")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of native images, as in recipe (%(default)s)")
    parser.add_argument("--min-pixels", type=int, default=0, help="of native images, as in the recipe (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored values")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from data_pipelines.shards.encode_latents import cache_latents
    from emma_train.config.schema import ImageConfig
    from emma_train.config.values import check_values
    from emma_train.model.autoencoder import autoencoder_config

    check_range("--batch-size", arguments.batch_size, 1, 65_536)
    limits = {"max_tokens": arguments.max_tokens, "min_pixels": arguments.min_pixels}
    images = [ImageConfig(mode=arguments.mode, side=side, **limits) for side in arguments.side]
    for image in images:
        check_values(image, "cache-latents", "--")
    rank, size, local = (int(os.environ.get(name, one)) for name, one in RANK_VARIABLES.items())
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    folders = shard_folders(arguments.folder)
    autoencoder = autoencoder_config(arguments.autoencoder, arguments.batch_size)
    if wrong := [side for side in arguments.side if side % autoencoder.pixels]:
        raise UserError(f"--side {wrong[0]}: must be a multiple of {autoencoder.pixels}, the pixels of a latent")
    for folder in folders:
        cache_latents(folder, autoencoder, images, device, rank, size, arguments.dtype)
    return 0
