"""From an index row to a sample: bytes, checksum, picture, tokens. Stateless, so any process may read any sample."""

import io
import json
import os
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from data_pipelines.stream.index import picture_names, read_group
from data_pipelines.stream.offers import Planned
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence import layout
from emma_train.sequence.geometry import picture_size, to_patches
from emma_train.sequence.pack import IGNORE_STEM, Pixels, Sample
from emma_train.sequence.seeds import seed_of, uniform_of
from emma_train.sequence.tokens import TextTokenizer

Image.MAX_IMAGE_PIXELS = 64 * 1024 * 1024


class BadSample(Exception):
    """A sample that cannot be read: broken bytes, an undecodable picture, an empty answer."""


class Reader:
    """Reads planned samples. Holds open files only."""

    def __init__(
        self, data: DataConfig, tokenizer: TextTokenizer, patch: int, shuffle: int, latents: str | None
    ) -> None:
        """`latents` is the fingerprint of the autoencoder whose cached latents may be used; None uses none."""
        self.data, self.tokenizer, self.patch, self.shuffle, self.latents = data, tokenizer, patch, shuffle, latents

    def read(self, planned: Planned) -> Sample:
        """The sample as the plan wants it. Raises BadSample."""
        try:
            members = read_group(_read_bytes(planned))
            record = json.loads(members["json"])
            alternative = record[planned.task][planned.alternative]
            return self._sample(planned, members, record, alternative)
        except BadSample:
            raise
        except Exception as error:  # whatever a stranger's data raises, the run goes on without this sample
            raise BadSample(f"{type(error).__name__}: {error}") from error

    def _sample(self, planned: Planned, members: dict[str, bytes], record: dict, alternative: dict) -> Sample:
        draw = (self.data.seed, planned.epoch, planned.key)
        context, text = list(alternative.get("images", [])), alternative.get("text", "")
        if planned.task == "i2t":
            turns = [(turn["role"], turn["text"]) for turn in alternative["turns"]]
            if not any(role == "assistant" and words for role, words in turns):
                raise BadSample("no answer to learn from")
            segments = layout.i2t(self.tokenizer, context, turns)
        else:
            if uniform_of(*draw, "text dropout") < self.data.text_dropout:
                text = ""
            if context and uniform_of(*draw, "reference dropout") < self.data.reference_dropout:
                context = []
            segments = layout.it2i(self.tokenizer, context, text, alternative["target"])
        files = {name.partition(".")[0]: members[name] for name in picture_names(members)}
        stem = int("stem" in record.get("tags", []))
        pictures = {
            name: self._picture(
                planned, name, files[name], self.data.und if planned.task == "i2t" else self.data.gen, stem
            )
            for name in context
        }
        if planned.task != "i2t":
            target = alternative["target"]
            pictures[target] = self._picture(planned, target, files[target], self.data.gen, IGNORE_STEM, target=True)
        return Sample(
            key=planned.key,
            task=planned.task,
            segments=segments,
            pictures=pictures,
            noise_seed=seed_of(*draw, "noise"),
            time_seed=seed_of(*draw, "time"),
        )

    def _picture(
        self, planned: Planned, name: str, data: bytes, image: ImageConfig, stem: int, target: bool = False
    ) -> Pixels:
        if planned.max_tokens:
            image = replace(image, max_tokens=min(image.max_tokens, planned.max_tokens))
        latent = None
        if self.latents is not None:
            path, picture_key = (
                latents_path(Path(planned.folder) / planned.name, transform_name(image)),
                f"{planned.key}/{name}",
            )
            latent = cached_latent(path, picture_key, self.latents, planned.shard)
        pixels = self.patch * self.shuffle
        with Image.open(io.BytesIO(data)) as picture:
            height, width = picture_size(*picture.size, image, pixels)
            grid = (height // pixels, width // pixels)
            if target and latent is not None:
                return Pixels(grid, None, latent, stem)
            return Pixels(
                grid, to_patches(load_picture(picture, height, width), self.patch, self.shuffle), latent, stem
            )


def load_picture(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Decode and resize: uint8 [height, width, 3]. Transparent pictures are laid on white."""
    picture.draft("RGB", (width, height))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


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


def _read_bytes(planned: Planned) -> bytes:
    tar = Path(planned.folder) / planned.name
    data = os.pread(_open(tar), planned.size, planned.offset)
    if len(data) != planned.size:
        raise BadSample(f"{tar} ends within the record: {len(data)} of {planned.size} bytes")
    if zlib.crc32(data) != planned.crc32:
        raise BadSample(f"{tar}: bytes differ from the index's crc32")
    return data


@lru_cache(maxsize=256)
def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY)
