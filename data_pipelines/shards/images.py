"""Images of a record: which members are images, their sizes and their pixels."""

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

Data = TypeVar("Data", bytes, memoryview)
EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"))
MAX_PIXELS = 64 << 20
"""Larger images are refused as decompression bombs: 64 Mi pixels are 192 MiB of RGB."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image raises an error instead


def image_parts(parts: Iterable[str]) -> list[str]:
    """Members that are images (img0.webp, ...), in the order in which the index numbers them."""
    return sorted(part for part in parts if part.rpartition(".")[2].lower() in EXTENSIONS)


def image_name(part: str) -> str:
    """The name by which a record refers to an image member: img0 for img0.webp, jpg for the member jpg."""
    return part.partition(".")[0]


def image_members(members: Mapping[str, Data]) -> dict[str, Data]:
    """The image members of a record by image name."""
    return {image_name(part): members[part] for part in image_parts(members)}


def open_image(data: bytes | memoryview) -> Image.Image:
    """Open an image and read only its header. Raises OSError if it is no image, ValueError if it is too large."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ValueError(f"an image of more than {2 * MAX_PIXELS:,} pixels") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def load_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Decode and resize: uint8 [height, width, 3]. Transparent images get a white background. Raises OSError."""
    image.draft("RGB", (width, height))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return np.asarray(image) if image.size == (width, height) else _resize(np.array(image), height, width)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing. Differs from PIL by at most one level of 255, and takes a fifth of its time."""
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = interpolate(channels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
