"""Images of a record: which members are images, their sizes and their pixels."""

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from emma_train.config.schema import ImageConfig
from emma_train.sequence.geometry import centre_box, image_size

Data = TypeVar("Data", bytes, memoryview)
EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"))
MAX_PIXELS = 64 << 20
"""Larger images are refused as decompression bombs: 64 Mi pixels are 192 MiB of RGB."""
DECODING = 2
"""Version of what pixels an image has, stored with cached latents. 1 ignored EXIF orientation and clipped 16 bits."""
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned for display, by EXIF orientation; 5 to 8 exchange width and height."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image raises an error instead
Image.init()  # a worker that is short of memory could not load a format's library, and PIL would not know the format


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
    """Open an image and read only its header.

    Raises OSError if it is no image, ValueError if it is too large or its pixels have no known range.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ValueError(f"an image of more than {2 * MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:  # Pillow's message has the address of the buffer
        raise UnidentifiedImageError("cannot identify image file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if image.format == "EPS":  # PIL would run Ghostscript, and so the program that the file is
        raise ValueError("a PostScript file, which is a program; convert it to PNG")
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers, whose range is not known; convert it to 8 or 16 bits")
    if image.format == "TIFF" and image.mode.startswith("I") and not _has_16_bits(image):
        raise ValueError("a TIFF image of 12-bit, 32-bit or signed integers; convert it to 8 or unsigned 16 bits")
    return image


def display_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image as people see it, after its EXIF orientation."""
    return image.size if _orientation(image) < 5 else (image.height, image.width)


def load_image(image: Image.Image, height: int, width: int, crop: bool = False) -> np.ndarray:
    """Decode, turn by the EXIF orientation and resize: uint8 [height, width, 3].

    With `crop`, only the middle of the image, with the aspect ratio of that size. Transparent images get a white
    background, 16 bits are scaled to 8. Raises OSError.
    """
    orientation = _orientation(image)
    image.draft("RGB", (width, height) if orientation < 5 else (height, width))
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if orientation in _TRANSPOSITIONS:
        image = image.transpose(_TRANSPOSITIONS[orientation])
    if crop:
        image = image.crop(centre_box(*image.size, width / height))
    return np.asarray(image) if image.size == (width, height) else _resize(np.array(image), height, width)


def load_resized(data: bytes | memoryview, image_config: ImageConfig, multiple: int) -> np.ndarray:
    """An image as training sees it: uint8 [height, width, 3], both sides multiples of `multiple` (32).

    Raises OSError, ValueError or SyntaxError if it cannot be read.
    """
    with open_image(data) as image:
        height, width = image_size(*display_size(image), image_config, multiple)
        return load_image(image, height, width, crop=image_config.mode == "crop").copy()


def decodes_differently(image: Image.Image) -> bool:
    """Whether an opened image has other pixels than in version 1 of DECODING."""
    return _orientation(image) != 1 or image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, from the header alone."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PIL would decode the whole file in search of it
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF can raise anything, and viewers ignore it
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the samples of an opened grey TIFF are unsigned 16-bit integers, which PIL opens in mode I;16."""
    bits_per_sample = 258
    return image.mode != "I" and image.tag_v2.get(bits_per_sample) == (16,)  # type: ignore[attr-defined]


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels 0 to 65535 scaled to 0 to 255. PIL's own conversion clips them at 255."""
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing. Differs from PIL by at most one level of 255, and takes a fifth of its time."""
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = interpolate(channels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
