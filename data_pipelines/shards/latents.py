"""Reads cached latents (written by `emma-data cache-latents`) from the file beside a shard.

It is a safetensors file. Its header has the position and checksum of each image's latent, so that reading a latent is
one read of a local or remote file.
"""

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.images import DECODING, decodes_differently, open_image
from data_pipelines.shards.tar import crc32
from emma_train.config.schema import ImageConfig
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, replace_suffix

log = logging.getLogger(__name__)
VALUE_TYPES = {"F16": "<f2", "F32": "<f4"}
"""numpy's names of the types that a file of latents may have, by those of safetensors."""
FIRST_READ = 1 << 18
"""Bytes of the first read of a file: the header of one or two thousand images."""


def transform_name(image_config: ImageConfig) -> str:
    """Names how an image is resized before it is encoded; part of the name of the file of latents."""
    name = f"{image_config.mode}-{image_config.side}"
    if image_config.mode != "native":
        return name
    return f"{name}-{image_config.max_tokens}" + (f"-{image_config.min_pixels}" if image_config.min_pixels else "")


def latents_path(shard: str | Path, transform: str) -> str:
    """Path or URL of the file of latents of a shard, for one transform."""
    return replace_suffix(str(shard), ".tar", f".{transform}.latents.safetensors")


def latents_metadata(fingerprint: str, shard: str, latents: dict[str, np.ndarray]) -> dict[str, str]:
    """Metadata of a file of latents: fingerprint of the autoencoder, sha256 of the shard, version of the decoding of
    images, checksum of each latent."""
    checksums = {name: crc32(latent.tobytes()) for name, latent in latents.items()}
    return {
        "autoencoder": fingerprint,
        "shard_sha256": shard,
        "decoding": str(DECODING),
        "crc32": json.dumps(checksums),
    }


def is_current(metadata: dict[str, str], fingerprint: str, shard: str) -> bool:
    """Whether a file of latents was made with this autoencoder (fingerprint) from this shard (sha256)."""
    return (metadata.get("autoencoder"), metadata.get("shard_sha256")) == (fingerprint, shard) and "crc32" in metadata


def cached_latent(
    url: str, name: str, image: bytes | memoryview, fingerprint: str, shard: str, storage: ShardReader
) -> np.ndarray | None:
    """float32 [tokens, channels] of an image; None if it is not cached, not current or damaged. The image itself must
    be encoded then. Raises what `open_image` raises."""
    table = _read_table(url, fingerprint, shard, storage)
    if table is None or (row := table.row(name)) is None:
        return None
    if table.decoding < DECODING:
        with open_image(image) as opened:
            if decodes_differently(opened):
                return None
    try:
        size = table.dtype.itemsize * int(table.shapes[row].prod())
        for _ in range(2):
            data = storage.read_range(url, int(table.offsets[row]), size, table.version)
            if crc32(data) == table.crc32[row]:
                return np.frombuffer(data, table.dtype).astype(np.float32, copy=False).reshape(table.shapes[row])
            storage.forget(url, table.version)
        log.warning("%s: the latent of %s is damaged; the image is encoded again", display_url(url), name)
    except StorageError as error:
        log.warning("%s; the image %s is encoded again", error, name)
    return None


@dataclass(frozen=True, eq=False)
class _LatentTable:
    """Positions of the latents in a file. As arrays, because a worker keeps those of a whole shuffle window."""

    version: str
    """Identifies a local copy of the file; differs between autoencoders."""
    names: np.ndarray
    """Hashes, ascending."""
    offsets: np.ndarray
    shapes: np.ndarray
    """[latents, 2]"""
    crc32: np.ndarray
    dtype: np.dtype
    """Of all values of the file."""
    decoding: int
    """Version of the decoding of the images (DECODING)."""

    def row(self, name: str) -> int | None:
        hashed = _hash(name)
        row = int(np.searchsorted(self.names, hashed))
        return row if row < len(self.names) and self.names[row] == hashed else None


@lru_cache(maxsize=256)
def _read_table(url: str, fingerprint: str, shard: str, storage: ShardReader) -> _LatentTable | None:
    """The positions of a file's latents; None if there is no current file."""
    version = blake2b(f"{fingerprint} {shard}".encode(), digest_size=8).hexdigest()
    try:
        values, start = _read_header(url, version, storage)
        metadata = values.pop("__metadata__", {})
        if not is_current(metadata, fingerprint, shard):
            return None
        checksums = json.loads(metadata["crc32"])
        names = sorted(values, key=_hash)
        (dtype,) = {values[name]["dtype"] for name in names} or {"F32"}
        return _LatentTable(
            version,
            np.array([_hash(name) for name in names], np.uint64),
            np.array([start + values[name]["data_offsets"][0] for name in names], np.int64),
            np.array([values[name]["shape"] for name in names], np.int32).reshape(-1, 2),
            np.array([checksums[name] for name in names], np.uint32),
            np.dtype(VALUE_TYPES[dtype]),
            int(metadata.get("decoding", 1)),
        )
    except StorageError as error:
        if not error.missing:
            log.warning("%s; its images are encoded again", error)
    except (ValueError, KeyError, AttributeError) as error:
        log.warning("%s: is not a file of latents (%s); its images are encoded again", display_url(url), error)
    return None


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest()))


def _read_header(url: str, version: str, storage: ShardReader) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of its data."""
    size = storage.size(url)
    data = storage.read_range(url, 0, min(size, FIRST_READ), version)
    length = int.from_bytes(data[:8], "little")
    if length > size - 8:
        raise ValueError("cut off")
    if len(data) < 8 + length:
        data += storage.read_range(url, len(data), 8 + length - len(data), version)
    return json.loads(data[8 : 8 + length]), 8 + length
