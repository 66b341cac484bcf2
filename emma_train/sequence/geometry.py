"""Image geometry: the size that an image takes before it becomes visual tokens (paper §2.1, §4)."""

import math
from functools import lru_cache

import numpy as np
from torch import Tensor

from emma_train.config.schema import ImageConfig


def image_size(width: int, height: int, image_config: ImageConfig, pixels: int) -> tuple[int, int]:
    """(height, width) in pixels that an image is resized to; both are multiples of `pixels` (32)."""
    if image_config.mode in ("square", "crop"):
        return image_config.side, image_config.side
    if image_config.mode == "buckets":
        aspect = math.log(width / height)
        return min(buckets(image_config.side, pixels), key=lambda hw: (abs(math.log(hw[1] / hw[0]) - aspect), hw))
    enlarged = max(1.0, math.sqrt(image_config.min_pixels / (width * height)))
    rows, columns = (max(1, round(enlarged * length / pixels)) for length in (height, width))
    if rows * columns > image_config.max_tokens:
        scale = math.sqrt(image_config.max_tokens / (rows * columns))
        rows, columns = max(1, int(rows * scale)), max(1, int(columns * scale))
        # A very long image keeps one row; its length alone must then respect the cap.
        rows, columns = (
            min(rows, image_config.max_tokens // columns or 1),
            min(columns, image_config.max_tokens // rows or 1),
        )
    return rows * pixels, columns * pixels


def centre_box(width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred part of an image whose width / height is `aspect`.

    To crop this part and scale it to a size gives the same image as to scale the image until it covers the size and
    crop it then.
    """
    kept_width = min(width, max(1, round(height * aspect)))
    kept_height = min(height, max(1, round(width / aspect)))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def is_suitable(width: int, height: int, image_config: ImageConfig) -> bool:
    """Whether an image of this size is used: not smaller than `min_side`, for buckets not longer than `max_aspect`."""
    shortest, longest = sorted((width, height))
    limit = image_config.max_aspect if image_config.mode == "buckets" else 0
    return shortest >= image_config.min_side and (not limit or longest <= limit * shortest)


@lru_cache(maxsize=8)
def buckets(side: int, pixels: int, max_aspect: float = 4.0) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket: sides multiples of `pixels`, area nearest to side², aspect up to
    `max_aspect`."""
    area = (side // pixels) ** 2
    sizes = set()
    # The shorter side sets the longer one, so that no two buckets differ by a rounding: 33 for 1024 pixels.
    for rows in range(1, side // pixels + 1):
        columns = round(area / rows)
        if columns and 1 / max_aspect <= rows / columns <= max_aspect:
            sizes |= {(rows * pixels, columns * pixels), (columns * pixels, rows * pixels)}
    return tuple(sorted(sizes))


def to_patches(image: np.ndarray, patch: int, shuffle: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [H*W/patch², patch*patch*3].

    The patches of a block of shuffle x shuffle follow each other, and the blocks are in raster order. So pixel shuffle
    is a reshape, and visual tokens are in raster order.
    """
    height, width, _ = image.shape
    block = patch * shuffle
    rows, columns = height // block, width // block
    blocks = image.reshape(rows, shuffle, patch, columns, shuffle, patch, 3)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 2, 5, 6)).reshape(-1, patch * patch * 3)


def from_patches(patches: Tensor, rows: int, columns: int, patch: int, shuffle: int) -> Tensor:
    """The inverse of to_patches for a grid of visual tokens: [rows*columns*shuffle², patch*patch*3] -> [H, W, 3]."""
    blocks = patches.reshape(rows, columns, shuffle, shuffle, patch, patch, 3)
    return blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(rows * shuffle * patch, columns * shuffle * patch, 3)
