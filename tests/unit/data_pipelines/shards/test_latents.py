"""Cached latents are read as written, locally and remotely; if a file is not usable, its images are encoded."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.cli import main
from data_pipelines.shards import latents
from data_pipelines.shards.latents import cached_latent, latents_metadata, latents_path
from emma_train.storage.local_cache import LocalCache
from emma_train.storage.shard_reader import ShardReader
from tests import public
from tests.servers import serving
from tests.shards import jpeg_with_orientation, png, prompt, sixteen_bit_png, write_shards

MARK, SHARD = "0123456789abcdef", "f" * 64
IMAGE = png(0)
NUM = 3000
"""So many that the header is longer than the first read."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    values = {f"p{i:05d}/img0": rng.standard_normal((1 + i % 3, 4), dtype=np.float32) for i in range(NUM)}
    path = Path(latents_path(tmp_path_factory.mktemp("latents") / "shard-000000.tar", "square-64"))
    save_file(values, path, latents_metadata(MARK, SHARD, values))
    return path


@pytest.fixture(autouse=True)
def fresh() -> None:
    latents._read_table.cache_clear()


def copy_of(file: Path, folder: Path) -> Path:
    path = folder / file.name
    path.write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_every_latent_is_the_one_that_was_written(file: Path, tmp_path: Path, far: bool, cached: bool) -> None:
    pytest.importorskip("aiohttp", reason="pip install 'emma-train[http]'")
    storage = ShardReader(cache=LocalCache(tmp_path / "cache", 2**24) if cached else None)
    assert file.stat().st_size > latents.FIRST_READ
    with serving(file.parent) as server:
        url = f"{server.url}/{file.name}?token=secret" if far else str(file)
        for name, value in list(load_file(file).items())[:: 100 if far else 1]:
            latent = cached_latent(url, name, IMAGE, MARK, SHARD, storage)
            assert latent is not None
            np.testing.assert_array_equal(latent, value)
        assert cached_latent(url, "p99999/img0", IMAGE, MARK, SHARD, storage) is None
    uncut = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert uncut == (file.stat().st_size if far and cached else 0)


def test_the_name_beside_a_shard_keeps_the_query_of_its_url() -> None:
    assert latents_path("https://host/a/s.tar?t=1", "square-64") == "https://host/a/s.square-64.latents.safetensors?t=1"
    assert latents_path("s3://b/s.tar", "square-64") == "s3://b/s.square-64.latents.safetensors"


@pytest.mark.parametrize(("mark", "shard"), [("other", SHARD), (MARK, "0" * 64)])
def test_latents_of_something_else_are_not_taken(file: Path, mark: str, shard: str) -> None:
    assert cached_latent(str(file), "p00000/img0", IMAGE, mark, shard, ShardReader()) is None


def test_latents_without_checksums_are_not_taken(file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), path := tmp_path / "old.safetensors", {"autoencoder": MARK, "shard_sha256": SHARD})
    assert cached_latent(str(path), "p00000/img0", IMAGE, MARK, SHARD, ShardReader()) is None


def test_a_flipped_byte_costs_one_latent_and_is_told(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, name, other = copy_of(file, tmp_path), "p00000/img0", "p00001/img0"
    data = bytearray(path.read_bytes())
    at = data.rindex(load_file(file)[name].tobytes())
    data[at + 3] ^= 1
    path.write_bytes(data)
    assert cached_latent(str(path), name, IMAGE, MARK, SHARD, ShardReader()) is None
    assert f"{path}: the latent of {name} is damaged; the image is encoded again" in caplog.text
    assert cached_latent(str(path), other, IMAGE, MARK, SHARD, ShardReader()) is not None


@pytest.mark.parametrize("size", [0, 5, 1000, 400_000])
def test_a_file_that_is_cut_off_is_told_and_not_taken(
    file: Path, tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_of(file, tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    assert cached_latent(str(path), max(load_file(file)), IMAGE, MARK, SHARD, ShardReader(retries=0)) is None
    assert str(path) in caplog.text


def test_a_missing_file_is_nothing_to_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cached_latent(str(tmp_path / "none.safetensors"), "p/img0", IMAGE, MARK, SHARD, ShardReader()) is None
    assert not caplog.text


def test_of_an_older_cache_only_latents_of_images_that_decode_as_before_are_used(file: Path, tmp_path: Path) -> None:
    """The first version of the decoding ignored EXIF orientation and clipped 16 bits."""
    metadata = latents_metadata(MARK, SHARD, values := load_file(file))
    assert metadata.pop("decoding") == "2"
    save_file(values, path := tmp_path / "old.safetensors", metadata)
    name = max(values)
    assert cached_latent(str(path), name, IMAGE, MARK, SHARD, ShardReader()) is not None
    for image in (jpeg_with_orientation(6), sixteen_bit_png()):
        assert cached_latent(str(path), name, image, MARK, SHARD, ShardReader()) is None
        assert cached_latent(str(file), name, image, MARK, SHARD, ShardReader()) is not None


@pytest.mark.seconds
def test_an_autoencoder_of_another_shape_is_cached_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 channels at 16 pixels."""
    blocks = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
        "block_types": ["ResBlock"] * 5, "block_out_channels": [8, 8, 8, 16, 16], "layers_per_block": [1] * 5,
        "qkv_multiscales": [[]] * 5,
    }.items()}  # fmt: skip
    public.autoencoder(tmp_path / "autoencoder", latent_channels=16, **blocks)
    write_shards(tmp_path / "set", [prompt("p0")])
    command = ["cache-latents", str(tmp_path / "set"), "--autoencoder", str(tmp_path / "autoencoder"), "--side"]
    assert main([*command, "48"]) == 0
    (latent,) = load_file(tmp_path / "set" / "shard-000000.square-48.latents.safetensors").values()
    assert latent.shape == (9, 16)
    capsys.readouterr()
    assert main([*command, "40"]) == 2
    assert capsys.readouterr().err == "error: --side 40: must be a multiple of 16, the pixels of a latent\n"
