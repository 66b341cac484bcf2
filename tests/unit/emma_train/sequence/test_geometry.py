"""Sizes of images, and patches in block order."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_train.config.schema import ImageConfig
from emma_train.sequence.geometry import buckets, centre_box, from_patches, image_size, is_suitable, to_patches

sides = st.integers(1, 4)


@given(sides, sides, st.integers(1, 3), st.integers(1, 4))
def test_from_patches_inverts_to_patches(rows: int, columns: int, shuffle: int, patch: int) -> None:
    shape = (rows * shuffle * patch, columns * shuffle * patch, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    patches = to_patches(image, patch, shuffle)
    assert patches.shape == (rows * columns * shuffle**2, patch * patch * 3) and patches.dtype == np.uint8
    assert np.array_equal(from_patches(torch.from_numpy(patches), rows, columns, patch, shuffle).numpy(), image)


def test_the_patches_of_a_visual_token_are_neighbours_and_tokens_are_in_raster_order() -> None:
    patch, shuffle, rows, columns = 4, 2, 3, 5
    y, x = np.mgrid[: rows * patch * shuffle, : columns * patch * shuffle]
    token = (y // (patch * shuffle)) * columns + x // (patch * shuffle)
    within = (y // patch % shuffle) * shuffle + x // patch % shuffle
    image = np.stack([token, within, token], -1).astype(np.uint8)
    patches = to_patches(image, patch, shuffle).reshape(rows * columns, shuffle**2, patch * patch, 3)
    for index in range(rows * columns):
        assert (patches[index, ..., 0] == index).all()
        assert (patches[index, ..., 1] == np.arange(shuffle**2)[:, None]).all()


def test_a_patch_is_row_major_with_channels_last() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    patches = to_patches(image, 16, 2)
    # Second token, third patch of it: lower left of the right half.
    assert np.array_equal(patches[4 + 2].reshape(16, 16, 3), image[16:32, 32:48])


def test_there_are_33_buckets_of_a_megapixel() -> None:
    sizes = buckets(1024, 32)
    assert len(sizes) == len(set(sizes)) == 33
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in sizes)
    assert max(abs(h * w / 1024**2 - 1) for h, w in sizes) < 0.025
    assert max(max(h / w, w / h) for h, w in sizes) <= 4.0 and (1024, 1024) in sizes and (512, 2048) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    heights = [h for h, _ in sizes]
    assert len(set(heights)) == 33


@pytest.mark.parametrize(("side", "count"), [(64, 3), (128, 5), (512, 17), (1024, 33)])
def test_bucket_counts_by_size(side: int, count: int) -> None:
    assert len(buckets(side, 32)) == count


@given(st.integers(1, 8000), st.integers(1, 8000))
def test_an_image_goes_to_the_bucket_of_the_nearest_aspect(width: int, height: int) -> None:
    image = ImageConfig(mode="buckets", side=1024)
    chosen = image_size(width, height, image, 32)

    def far(hw: tuple[int, int]) -> float:
        return abs(math.log(hw[1] / hw[0] * height / width))

    assert chosen in buckets(1024, 32) and far(chosen) == pytest.approx(min(map(far, buckets(1024, 32))), abs=1e-12)


@pytest.mark.parametrize("mode", ["square", "crop"])
def test_square_and_crop_have_one_size(mode: str) -> None:
    image_config = ImageConfig(mode=mode, side=512)
    assert {image_size(w, h, image_config, 32) for w, h in ((1, 1), (4000, 30), (512, 512))} == {(512, 512)}


@pytest.mark.parametrize(
    ("size", "aspect", "box"),
    [
        ((1920, 1080), 1.0, (420, 0, 1500, 1080)),
        ((1080, 1920), 1.0, (0, 420, 1080, 1500)),
        ((512, 512), 1.0, (0, 0, 512, 512)),
        ((1000, 500), 4.0, (0, 125, 1000, 375)),
        ((8, 300), 4.0, (0, 149, 8, 151)),
        ((1, 9000), 1.0, (0, 4499, 1, 4500)),
    ],
)
def test_the_centre_box_is_the_largest_of_its_aspect(
    size: tuple[int, int], aspect: float, box: tuple[int, ...]
) -> None:
    assert centre_box(*size, aspect) == box


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 512))
def test_native_sides_are_multiples_under_the_cap(width: int, height: int, cap: int) -> None:
    high, wide = image_size(width, height, ImageConfig(mode="native", max_tokens=cap), 32)
    rows, columns = high // 32, wide // 32
    assert (high % 32, wide % 32) == (0, 0) and rows >= 1 and columns >= 1 and rows * columns <= cap
    plain = max(1, round(height / 32)), max(1, round(width / 32))
    if plain[0] * plain[1] <= cap:
        assert (rows, columns) == plain
    elif min(rows, columns) >= 8:
        # Scaled down as a whole: the aspect ratio moves by no more than the rounding of the shorter side.
        assert abs(math.log(rows / columns * plain[1] / plain[0])) <= 1 / min(rows, columns) + 1e-9


def test_the_native_cap_keeps_the_aspect_and_uses_the_budget() -> None:
    image = ImageConfig(mode="native", max_tokens=1024)
    assert image_size(2048, 2048, image, 32) == (1024, 1024)
    assert image_size(4096, 1024, image, 32) == (512, 2048)
    assert image_size(640, 480, image, 32) == (480, 640)
    assert image_size(500, 49, image, 32) == (64, 512)
    assert image_size(200000, 32, image, 32) == (32, 32768)
    assert image_size(5, 5, image, 32) == (32, 32)


NATIVE = ImageConfig(mode="native", max_tokens=1024)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (16, 64), (1, 1024), (1024, 1), (2, 512)])
def test_an_image_at_the_cap_is_left_as_it_is_and_one_row_more_is_not(rows: int, columns: int) -> None:
    assert image_size(columns * 32, rows * 32, NATIVE, 32) == (rows * 32, columns * 32)
    assert image_size(columns * 32 + 15, rows * 32 + 15, NATIVE, 32) == (rows * 32, columns * 32)
    high, wide = image_size(columns * 32, rows * 32 + 32, NATIVE, 32)
    assert high * wide // 1024 <= 1024
    # Scaled down as a whole, by as little as whole rows and columns allow.
    assert rows - 1 <= high // 32 <= rows + 1 and wide // 32 >= columns * rows // (rows + 1) - 1


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 31), (31, 5), (47, 16), (1, 47)])
def test_a_tiny_image_has_one_token(width: int, height: int) -> None:
    assert image_size(width, height, NATIVE, 32) == (32, 32)
    assert image_size(width, height, ImageConfig(mode="native", max_tokens=1), 32) == (32, 32)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (1_000_000, 1, (1, 1024)),
        (1, 1_000_000, (1024, 1)),
        (64_000, 640, (3, 320)),
        (640, 64_000, (320, 3)),
        (20_000, 20_000, (32, 32)),
        (4096, 4000, (31, 32)),
    ],
)
def test_native_images_of_any_shape_come_under_the_cap(width: int, height: int, size: tuple[int, int]) -> None:
    assert image_size(width, height, NATIVE, 32) == (size[0] * 32, size[1] * 32)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (1, 1, (1024, 1024)),
        (10_000, 1, (512, 2048)),
        (1, 10_000, (2048, 512)),
        (4000, 1000, (512, 2048)),
        (1920, 1080, (768, 1376)),
        (1080, 1920, (1376, 768)),
        (1025, 1024, (1024, 1024)),
    ],
)
def test_a_bucket_for_images_of_any_shape(width: int, height: int, size: tuple[int, int]) -> None:
    assert image_size(width, height, ImageConfig(mode="buckets", side=1024), 32) == size


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(28, 28, (8, 8)), (300, 20, (2, 31)), (256, 256, (8, 8)), (640, 480, (15, 20)), (1, 1, (8, 8))],
)
def test_small_images_are_scaled_up_to_the_fewest_pixels(width: int, height: int, grid: tuple[int, int]) -> None:
    image_config = ImageConfig(mode="native", max_tokens=1024, min_pixels=256 * 256)
    assert image_size(width, height, image_config, 32) == (grid[0] * 32, grid[1] * 32)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
def test_the_cap_of_tokens_holds_whatever_the_fewest_pixels(width: int, height: int, min_pixels: int) -> None:
    image_config = ImageConfig(mode="native", max_tokens=200, min_pixels=min_pixels)
    size = image_size(width, height, image_config, 32)
    assert size[0] * size[1] <= 200 * 32**2
    if width * height >= min_pixels:
        assert size == image_size(width, height, replace(image_config, min_pixels=0), 32)


@pytest.mark.parametrize(
    ("size", "image_config", "expected"),
    [
        ((8, 8), ImageConfig(), True),
        ((511, 4000), ImageConfig(min_side=512), False),
        ((512, 4000), ImageConfig("native", min_side=512), True),
        ((800, 100), ImageConfig("buckets", 1024), False),  # would become 4:1, squeezed to half
        ((100, 800), ImageConfig("buckets", 1024), False),
        ((500, 100), ImageConfig("buckets", 1024), True),
        ((800, 100), ImageConfig("buckets", 1024, max_aspect=0), True),
        ((800, 100), ImageConfig("native"), True),
        ((800, 100), ImageConfig("square"), True),
    ],
)
def test_images_that_are_too_small_or_too_long_are_not_suitable(
    size: tuple[int, int], image_config: ImageConfig, expected: bool
) -> None:
    assert is_suitable(*size, image_config) == expected
