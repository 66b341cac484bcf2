"""Images of a record: which members they are, their size, and their pixels."""

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
"""An image that claims more is a bomb: 64 Mi pixels are 192 MiB of RGB."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses what it warns of


def image_parts(parts: Iterable[str]) -> list[str]:
    """Members that are images (img0.webp, ...), in the order that the index numbers them."""
    return sorted(part for part in parts if part.rpartition(".")[2].lower() in EXTENSIONS)


def image_name(part: str) -> str:
    """What a record calls the image of a member: img0 for img0.webp, jpg for a member of that name."""
    return part.partition(".")[0]


def images_of(members: Mapping[str, Data]) -> dict[str, Data]:
    """A record's images by name."""
    return {image_name(part): members[part] for part in image_parts(members)}


def open_image(data: bytes | memoryview) -> Image.Image:
    """An image of which only the header is read. Raises OSError where there is none, ValueError on a bomb."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ValueError(f"an image of more than {2 * MAX_PIXELS:,} pixels") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def load_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Decode and resize: uint8 [height, width, 3]. Transparent images are laid on white. Raises OSError."""
    image.draft("RGB", (width, height))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return np.asarray(image) if image.size == (width, height) else _resize(np.array(image), height, width)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing: PIL's pixels to one level of 255, by vector instructions in a fifth of its time."""
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = interpolate(channels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
