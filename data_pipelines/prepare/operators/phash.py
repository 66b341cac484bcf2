"""`phash`: perceptual hashes of a record's images. `duplicates` (prepare/duplicates.py) compares them."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, Rejected, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.shards.images import display_size, load_image, open_image

HASH_SIDE = 8
"""A hash has HASH_SIDE² = 64 bits: the signs of the lowest frequencies of a 32 x 32 grey image."""


def perceptual_hash(data: bytes | memoryview) -> str:
    """Of an encoded image, as 16 hexadecimal digits; equal for copies at another size or quality, but for a few bits.

    Raises OSError or ValueError if it cannot be read.
    """
    import imagehash
    from PIL import Image

    with open_image(data) as image:
        width, height = display_size(image)
        scale = max(1.0, min(width, height) / 256)
        pixels = load_image(image, max(1, round(height / scale)), max(1, round(width / scale)))
    return str(imagehash.phash(Image.fromarray(pixels), HASH_SIDE))


def _phash(record: StoredRecord) -> Mapping[str, Any] | Rejected:
    if not record.images:
        return Rejected("it has no image")
    hashes = [perceptual_hash(data) for data in record.images.values()]
    return {"hash": hashes[record.main_image], "hashes": hashes}


def _start(settings: Mapping[str, Any]) -> Annotate:
    return for_each_record(_phash)


PHASH = Operator("phash", 1, {"hash": pa.string(), "hashes": pa.list_(pa.string())}, _start)
"""hashes: one for each image, in the order of the index; hash: of the image that the record makes, or of its first."""
