"""Latents beside a shard (`emma-data cache-latents`): where they are, and whether they are of this autoencoder."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import safe_open

from emma_train.config.schema import ImageConfig


def transform_name(image: ImageConfig) -> str:
    """What was done to a picture before it was encoded; part of the name of its cached latent."""
    return f"{image.mode}-{image.side}" + (f"-{image.max_tokens}" if image.mode == "native" else "")


def latents_path(tar: Path, transform: str) -> Path:
    """The latents beside a shard, for one transform."""
    return tar.with_suffix(f".{transform}.latents.safetensors")


def cached_latent(path: Path, name: str, fingerprint: str, shard: str) -> np.ndarray | None:
    """float32 [tokens, channels] of a picture, or None where the cache is absent or made from something else."""
    file = _open_latents(path, fingerprint, shard)
    if file is None:
        return None
    try:
        return file.get_tensor(name)
    except Exception:  # safetensors raises its own error for an unknown name: the picture came after the cache
        return None


@lru_cache(maxsize=256)
def _open_latents(path: Path, fingerprint: str, shard: str):  # type: ignore[no-untyped-def]
    if not path.is_file():
        return None
    file = safe_open(path, framework="numpy")
    return file if file.metadata() == {"autoencoder": fingerprint, "shard_sha256": shard} else None
