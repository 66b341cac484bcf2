"""Images of a record for models: which one stands for the record, and how large it is shown."""

import io

import numpy as np
from PIL import Image

from data_pipelines.prepare.stored_record import StoredRecord
from data_pipelines.shards.images import display_size, load_image, open_image

CHAT_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def main_image(record: StoredRecord) -> str:
    """Name of the image that the record's first alternative makes, or else of its first image. Raises ValueError where
    it has none."""
    names = record.image_names
    if not names:
        raise ValueError("it has no image")
    targets = [number for row in record.rows.values() for number in row["target"] if number >= 0]
    return names[targets[0]] if targets else names[0]


def rgb_image(data: bytes | memoryview, max_side: int) -> np.ndarray:
    """An encoded image, decoded and turned as people see it: uint8 [height, width, 3], its longer side at most
    `max_side` pixels. Raises OSError or ValueError."""
    with open_image(data) as image:
        width, height = display_size(image)
        scale = max(1.0, max(width, height) / max_side)
        return load_image(image, max(1, round(height / scale)), max(1, round(width / scale)))


def image_for_chat(data: bytes, max_side: int) -> bytes:
    """An image file for a chat model: as it is stored where it is small enough, upright and of a format that models
    read, else a JPEG of quality 95. Raises OSError or ValueError."""
    with open_image(data) as image:
        upright = display_size(image) == image.size and image.getexif().get(0x0112, 1) == 1
        if upright and image.format in CHAT_FORMATS and max(image.size) <= max_side and image.mode in ("RGB", "L"):
            image.load()  # a broken file is the record's fault, and not one of the model's answers
            return bytes(data)
    file = io.BytesIO()
    Image.fromarray(rgb_image(data, max_side)).save(file, "JPEG", quality=95)
    return file.getvalue()
