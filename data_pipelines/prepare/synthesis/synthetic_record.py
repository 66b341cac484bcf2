"""A record that was made, and the settings that it was made with."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from PIL import Image

from data_pipelines.prepare.operator import Rejected
from data_pipelines.prepare.stored_record import StoredRecord


@dataclass(frozen=True)
class SyntheticRecord:
    """A record of the new set."""

    record: Mapping[str, Any]
    """As docs/data.md has it."""
    images: Mapping[str, bytes]
    """Encoded images by their names as members: img0.jpg, img1.webp."""


SynthesisOutcome = SyntheticRecord | Rejected
Synthesize = Callable[[Sequence[StoredRecord]], list[SynthesisOutcome]]
"""A batch of records -> for each of them a new record, or why there is none."""


@dataclass(frozen=True)
class Synthesis:
    """A way of making records, as data."""

    name: str
    version: int
    """Raise it with each change after which the same record gives another one."""
    start: Callable[[Mapping[str, Any]], Synthesize]
    """Called with the settings once in each process; loads the models."""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """With their defaults; --set changes them."""
    not_identity: frozenset[str] = frozenset()
    """Settings that do not change what is made."""
    files: frozenset[str] = frozenset()
    """Settings that name files or folders."""
    batch_size: int = 16


def lossless(image: Image.Image) -> bytes:
    """An image as lossless WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=50)
    return file.getvalue()


def pair_record(
    before: tuple[str, bytes], after: Image.Image, texts: tuple[str, str], kinds: tuple[str, str], **fields: Any
) -> SyntheticRecord:
    """An edit and its reverse. `before` is (extension, encoded image); texts and kinds are (edit, reverse)."""
    extension, data = before
    edits = [
        {"images": ["img0"], "target": "img1", "text": texts[0], "kind": kinds[0]},
        {"images": ["img1"], "target": "img0", "text": texts[1], "kind": kinds[1]},
    ]
    images = {f"img0.{extension}": data, "img1.webp": lossless(after)}
    return SyntheticRecord({"it2i": edits, **fields}, images)
