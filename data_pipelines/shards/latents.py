"""Latents beside a shard (`emma-data cache-latents`): where they are, and whether they are of this autoencoder.

They are a safetensors file whose header says of each image where its latent lies and what its checksum is, so that
one image is one read, of a local file or a remote one.
"""

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.shards.tar import crc32
from emma_train.config.schema import ImageConfig
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, replace_suffix

log = logging.getLogger(__name__)
FIRST_READ = 1 << 18
"""Bytes of a file that are asked for first: the header of a thousand images or two."""


def transform_name(image_config: ImageConfig) -> str:
    """What was done to an image before it was encoded; part of the name of its cached latent."""
    return f"{image_config.mode}-{image_config.side}" + (
        f"-{image_config.max_tokens}" if image_config.mode == "native" else ""
    )


def latents_path(shard: str | Path, transform: str) -> str:
    """Path or URL of the latents beside a shard, for one transform."""
    return replace_suffix(str(shard), ".tar", f".{transform}.latents.safetensors")


def metadata_of(fingerprint: str, shard: str, latents: dict[str, np.ndarray]) -> dict[str, str]:
    """Metadata of a file of latents: the autoencoder's fingerprint, the shard's sha256, a checksum of each latent."""
    checksums = {name: crc32(latent.tobytes()) for name, latent in latents.items()}
    return {"autoencoder": fingerprint, "shard_sha256": shard, "crc32": json.dumps(checksums)}


def fits(metadata: dict[str, str], fingerprint: str, shard: str) -> bool:
    """Whether a file of latents is of this autoencoder (its fingerprint) and this shard (its sha256)."""
    return (metadata.get("autoencoder"), metadata.get("shard_sha256")) == (fingerprint, shard) and "crc32" in metadata


def cached_latent(url: str, name: str, fingerprint: str, shard: str, storage: ShardReader) -> np.ndarray | None:
    """float32 [tokens, channels] of an image, or None where it is not cached, made from something else or damaged:
    then it is encoded anew, from the image itself."""
    table = _table(url, fingerprint, shard, storage)
    if table is None or (row := table.row(name)) is None:
        return None
    try:
        for _ in range(2):
            data = storage.read_range(url, int(table.offsets[row]), 4 * int(table.shapes[row].prod()), table.version)
            if crc32(data) == table.crc32[row]:
                return np.frombuffer(data, "<f4").reshape(table.shapes[row])
            storage.forget(url, table.version)
        log.warning("%s: the latent of %s is damaged; encoded anew", display_url(url), name)
    except StorageError as error:
        log.warning("%s; the latent of %s is encoded anew", error, name)
    return None


@dataclass(frozen=True, eq=False)
class _Table:
    """Where the latents of a file lie. Arrays, because a worker holds those of a whole shuffle window."""

    version: str
    """Tells local copies of the file from those of other autoencoders."""
    names: np.ndarray
    """Hashes, ascending."""
    offsets: np.ndarray
    shapes: np.ndarray
    """[latents, 2]"""
    crc32: np.ndarray

    def row(self, name: str) -> int | None:
        hashed = _hash(name)
        row = int(np.searchsorted(self.names, hashed))
        return row if row < len(self.names) and self.names[row] == hashed else None


@lru_cache(maxsize=256)
def _table(url: str, fingerprint: str, shard: str, storage: ShardReader) -> _Table | None:
    """What a file holds; None where there is none that fits."""
    version = blake2b(f"{fingerprint} {shard}".encode(), digest_size=8).hexdigest()
    try:
        values, start = _read_header(url, version, storage)
        metadata = values.pop("__metadata__", {})
        if not fits(metadata, fingerprint, shard):
            return None
        checksums = json.loads(metadata["crc32"])
        names = sorted(values, key=_hash)
        return _Table(
            version,
            np.array([_hash(name) for name in names], np.uint64),
            np.array([start + values[name]["data_offsets"][0] for name in names], np.int64),
            np.array([values[name]["shape"] for name in names], np.int32).reshape(-1, 2),
            np.array([checksums[name] for name in names], np.uint32),
        )
    except StorageError as error:
        if not error.missing:
            log.warning("%s; its images are encoded anew", error)
    except (ValueError, KeyError, AttributeError) as error:
        log.warning("%s: is no file of latents (%s); its images are encoded anew", display_url(url), error)
    return None


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest()))


def _read_header(url: str, version: str, storage: ShardReader) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    size = storage.size(url)
    data = storage.read_range(url, 0, min(size, FIRST_READ), version)
    length = int.from_bytes(data[:8], "little")
    if length > size - 8:
        raise ValueError("cut off")
    if len(data) < 8 + length:
        data += storage.read_range(url, len(data), 8 + length - len(data), version)
    return json.loads(data[8 : 8 + length]), 8 + length
