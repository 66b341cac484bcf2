"""Images are loaded as people see them: turned by their EXIF orientation, 16 bits scaled to 8, floats refused."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.loader.requests import read_requests
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.check import check_folder
from data_pipelines.shards.images import display_size, load_image, load_resized, open_image
from data_pipelines.shards.index import read_columns
from emma_train.commands.generate import _load_image
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.errors import UserError
from tests.helpers import ASSETS
from tests.shards import jpeg_with_orientation, prompt, sixteen_bit_png, write_shards

NATIVE = ImageConfig("native")


def tiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_of_any_orientation_is_upright(orientation: int) -> None:
    data = jpeg_with_orientation(orientation)
    with open_image(data) as image:
        assert display_size(image) == (64, 32)
    pixels = load_resized(data, NATIVE, 32)
    assert pixels.shape == (32, 64, 3)
    assert pixels[:14, :14].min() > 240
    assert pixels[18:].max() < 15 and pixels[:, 18:].max() < 15
    np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_large_photograph_is_decoded_small_and_upright(orientation: int) -> None:
    with open_image(jpeg_with_orientation(orientation, 1024, 512)) as image:
        pixels = load_image(image, 32, 64)
        assert image.size == (64, 128), "the decoder's scale is that of the upright image"
    assert pixels[:14, :14].min() > 240 and pixels[18:].max() < 15


def test_broken_exif_is_ignored() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 32)).save(file, "JPEG", exif=b"Exif\0\0garbage")
    assert load_resized(file.getvalue(), NATIVE, 32).shape == (32, 64, 3)


def test_a_png_is_not_decoded_in_search_of_its_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_image(sixteen_bit_png()) as image:
        monkeypatch.setattr(image, "load", lambda: pytest.fail("decoded"))
        assert display_size(image) == (64, 32)


@pytest.mark.parametrize("kind", ["png", "little-endian TIFF", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    data = {
        "png": sixteen_bit_png(),
        "little-endian TIFF": tiff(ramp),
        "pgm": b"P5 64 32 65535\n" + ramp.astype(">u2").tobytes(),
    }[kind]
    pixels = load_resized(data, NATIVE, 32)
    assert abs(pixels.mean() - 127.5) < 0.5  # 254.5 where PIL clips
    np.testing.assert_allclose(pixels[0, :, 0], np.linspace(0, 255, 64), atol=0.51)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_pixels_of_unknown_range_are_left_out_with_the_reason(
    tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, record, _ = prompt("p001")
    bad = (key, record, {"img0.tif": tiff(np.ones((32, 32), dtype))})
    with caplog.at_level(logging.WARNING):
        folder = write_shards(tmp_path, [prompt("p000"), bad])
    (shard,) = json.loads((folder / "manifest.json").read_text())["shards"]
    assert (shard["rows"]["t2i"], shard["left_out"]) == (1, 1)
    assert "convert it to 8 or" in caplog.text


def test_index_check_and_requests_see_the_upright_image(tmp_path: Path) -> None:
    record = {"t2i": [{"target": "img0", "text": "a block"}]}
    folder = write_shards(tmp_path, [("p000", record, {"img0.jpg": jpeg_with_orientation(6)})])
    index_folder(folder, ASSETS / "tokenizer", force=True)
    (row,) = read_columns(folder, "shard-000000.tar", "t2i").to_pylist()
    assert (row["widths"], row["heights"]) == ([64], [32])
    assert check_folder(folder) == []
    (request,) = read_requests(folder, "t2i", DataConfig(tokenizer="", gen=NATIVE), 32)
    assert request.target is not None and request.target.shape == (32, 64, 3)
    assert request.target[:14, :14].min() > 240


def test_generate_loads_an_image_as_training_does(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg_with_orientation(6))
    pixels = _load_image(str(tmp_path / "photo.jpg"), NATIVE, 32)
    assert pixels.shape == (32, 64, 3) and pixels[:14, :14].min() > 240
    (tmp_path / "floats.tif").write_bytes(tiff(np.ones((32, 32), np.float32)))
    with pytest.raises(UserError, match=r"--image .*floats\.tif: cannot be read \(an image of floating-point numbers"):
        _load_image(str(tmp_path / "floats.tif"), NATIVE, 32)


def test_a_postscript_file_is_refused_because_decoding_would_run_it() -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(rm) run\n%%EOF\n"
    with pytest.raises(ValueError, match="a PostScript file, which is a program"):
        open_image(program)
