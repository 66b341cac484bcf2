"""The frozen autoencoder: order, chunks, and errors that name the folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emma_train.config.schema import AutoencoderConfig
from emma_train.errors import UserError
from emma_train.model.autoencoder import WEIGHTS, Autoencoder, fingerprint
from tests.helpers import ASSETS, make_image

FOLDER = ASSETS / "autoencoder"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(path=str(FOLDER), chunk=2), CPU)


def test_images_of_mixed_sizes_come_back_in_their_order(autoencoder: Autoencoder) -> None:
    grids = [(2, 2), (1, 3), (2, 2), (3, 1), (2, 2), (1, 3)]
    images = [torch.from_numpy(make_image(*grid, seed=i)) for i, grid in enumerate(grids)]
    together = autoencoder.encode(images)
    assert [tuple(x.shape) for x in together] == [(r * c, 32) for r, c in grids]
    for image, latent in zip(images, together, strict=True):
        assert latent.dtype == torch.float32 and not latent.requires_grad
        torch.testing.assert_close(autoencoder.encode([image])[0], latent, rtol=1e-4, atol=1e-4)
    assert autoencoder.encode([]) == []


def test_latents_are_in_raster_order(autoencoder: Autoencoder) -> None:
    image = torch.from_numpy(make_image(4, 6))
    changed = image.clone()
    changed[3 * 32 + 8 : 3 * 32 + 24, 32 + 8 : 32 + 24] = 255 - changed[3 * 32 + 8 : 3 * 32 + 24, 32 + 8 : 32 + 24]
    before, after = autoencoder.encode([image])[0], autoencoder.encode([changed])[0]
    assert int((after - before).norm(dim=1).argmax()) == 3 * 6 + 1


def test_a_decoded_image_is_uint8_of_the_latents_size(autoencoder: Autoencoder) -> None:
    made = autoencoder.decode(torch.randn(6, 32), 2, 3)
    assert made.shape == (64, 96, 3) and made.dtype == torch.uint8


def test_it_has_no_weights_that_a_model_could_train(autoencoder: Autoencoder) -> None:
    assert not isinstance(autoencoder, torch.nn.Module)
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in autoencoder._model.parameters())


def test_the_fingerprint_follows_weights_and_config_but_not_the_library(
    tmp_path: Path, autoencoder: Autoencoder
) -> None:
    copied = shutil.copytree(FOLDER, tmp_path / "copy")
    assert fingerprint(copied) == autoencoder.fingerprint and len(autoencoder.fingerprint) == 16
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9"}))
    assert fingerprint(copied) == autoencoder.fingerprint
    (copied / "config.json").write_text(json.dumps({**config, "scaling_factor": 9.0}))
    assert fingerprint(copied) != autoencoder.fingerprint
    with pytest.raises(UserError, match="cannot read the autoencoder .* set model.autoencoder.path"):
        fingerprint(tmp_path)


def test_a_recipe_that_expects_another_shape_is_told() -> None:
    with pytest.raises(UserError, match="has 32 channels at 32x, but the recipe says 16 at 32x"):
        Autoencoder(AutoencoderConfig(path=str(FOLDER), channels=16), CPU)


def test_weights_that_are_missing_are_an_error_not_random_values(tmp_path: Path) -> None:
    copied = shutil.copytree(FOLDER, tmp_path / "copy")
    weights = load_file(copied / WEIGHTS)
    first = min(weights)
    del weights[first]
    save_file(weights, copied / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are missing, such as {first}.*copy or download them again"):
        Autoencoder(AutoencoderConfig(path=str(copied)), CPU)
