"""The tiny autoencoder: training on simple drawings, and the weights in the repository."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor

from data_pipelines.emoji.splits import is_heldout_concept
from data_pipelines.emoji.train_autoencoder import (
    ARCHITECTURE,
    ComposedImages,
    Drawings,
    ImageComposer,
    encode_images,
    load_autoencoder,
    load_drawings,
    normalise,
    orthogonalise,
    psnr,
    save_autoencoder,
    shrink_latents,
    to_tensor,
    train_autoencoder,
)
from emma_train.errors import UserError

ASSETS = Path(__file__).parents[4] / "recipes" / "tiny" / "assets"
WEIGHTS = ASSETS / "autoencoder"


@pytest.fixture(scope="module")
def composer(package: Path) -> ImageComposer:
    return ImageComposer(load_drawings(package / "icons"), stems=2)


@pytest.mark.seconds
def test_training_lowers_the_loss_and_the_folder_keeps_the_model(composer: ImageComposer, tmp_path: Path) -> None:
    one = ComposedImages(lambda _: composer.single(np.random.default_rng(5)), seed=0)
    model, losses = train_autoencoder(one, minutes=1, steps=10, batch=2)
    assert len(losses) == 10 and losses[-1] < 0.96 * losses[0]
    images = ComposedImages(composer.any, 0).first(8)
    stored = save_autoencoder(model, tmp_path, images)
    rounded = model.bfloat16().float()
    assert torch.allclose(stored(normalise(images)).sample, rounded(normalise(images)).sample, atol=1e-4)
    assert float(encode_images(stored, images).std() * stored.config.scaling_factor) == pytest.approx(1, abs=1e-3)
    assert 0.7 < stored.config.scaling_factor < 1.5


def test_shrunk_latents_are_a_power_of_two_smaller_and_images_stay() -> None:
    torch.manual_seed(0)
    model = AutoencoderDC(**ARCHITECTURE)
    for weight in model.parameters():  # trained biases are not zero
        weight.data.add_(0.02 * torch.randn_like(weight))
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    before, sample = encode_images(model, images), model(normalise(images)).sample
    shrink_latents(model, 0.25)
    assert torch.allclose(encode_images(model, images), before * 4, rtol=1e-4, atol=1e-4)
    assert torch.allclose(model(normalise(images)).sample, sample, atol=1e-3)


def test_images_are_a_function_of_seed_and_number(composer: ImageComposer) -> None:
    drawn = ComposedImages(composer.any, 1)
    assert drawn[3].shape == (3, 128, 128) and drawn[3].dtype == torch.uint8
    assert torch.equal(drawn[3], ComposedImages(composer.any, 1)[3])
    assert not torch.equal(drawn[3], drawn[4]) and not torch.equal(drawn[3], ComposedImages(composer.any, 2)[3])


def test_held_out_concepts_are_held_out_in_all_styles_tones_and_genders() -> None:
    assert not is_heldout_concept("cat")
    heldout = next(name for n in range(1000) if is_heldout_concept(name := f"woman x{n}"))
    bare = heldout.removeprefix("woman ")
    names = ["flat/cat", f"modern/{heldout}", *(f"flat/man-{bare}-{tone}" for tone in ("default", "dark"))]
    names = [name.replace(" ", "-") for name in names]
    seen, unseen = Drawings(np.zeros((4, 1, 1, 4), np.uint8), names).split()
    assert seen.names == ["flat/cat"] and unseen.names == names[1:]


def test_psnr_of_a_known_error() -> None:
    class OffByATenth:
        def __call__(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=x + 0.2)  # a tenth of the range from -1 to 1

    grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    assert psnr(OffByATenth(), grey).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 72), (64, 16)])
def test_orthogonal_makes_singular_values_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix)) / (0.2 * max(shape) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.5


def test_a_folder_without_drawings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fluentui-emoji"):
        load_drawings(tmp_path)


def test_committed_weights_are_small_and_fit_their_config() -> None:
    model = load_autoencoder(WEIGHTS)
    assert model.num_parameters() <= 4_000_000
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 8_000_000
    assert {key: plain(model.config[key]) for key in ARCHITECTURE} == {key: plain(v) for key, v in ARCHITECTURE.items()}
    assert encode_images(model, torch.zeros(1, 3, 64, 128, dtype=torch.uint8)).shape == (1, 32, 2, 4)


def test_committed_weights_give_unit_latents_and_good_images_on_the_emoji_set() -> None:
    shards = sorted((ASSETS / "emoji").glob("heldout_concepts/*.tar"))
    if not shards:
        pytest.skip("the emoji set is not there")
    images = torch.stack(webp_images(shards[0], 64))
    model = load_autoencoder(WEIGHTS)
    assert float(encode_images(model, images).std() * model.config.scaling_factor) == pytest.approx(1, abs=0.1)
    assert float(psnr(model, images).mean()) >= 22


def plain(value: Any) -> Any:
    """Converts tuples to lists, as in JSON."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def webp_images(shard: Path, count: int) -> list[Tensor]:
    with tarfile.open(shard) as tar:
        streams = (tar.extractfile(member) for member in tar if member.name.endswith(".webp"))
        matches = [to_tensor(Image.open(io.BytesIO(s.read())).convert("RGB")) for s in streams if s is not None]
    return matches[:count]
