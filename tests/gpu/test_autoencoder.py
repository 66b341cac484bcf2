"""What float32 means on a GPU: TF32 in DC-AE's convolutions, full precision in matrix products."""

import pytest
import torch

from emma_train.config.schema import AutoencoderConfig
from emma_train.model.autoencoder import Autoencoder, set_float32_precision
from tests.helpers import ASSETS, make_image

pytestmark = pytest.mark.gpu
CONFIG = AutoencoderConfig(path=str(ASSETS / "autoencoder"))


def test_latents_of_a_gpu_are_those_of_a_cpu_up_to_tf32() -> None:
    pytest.importorskip("diffusers")
    images = [torch.from_numpy(make_image(4, 4, seed=seed)) for seed in range(4)]
    on_cpu = torch.cat(Autoencoder(CONFIG, torch.device("cpu")).encode(images))
    on_gpu = torch.cat(Autoencoder(CONFIG, torch.device("cuda")).encode(images)).cpu()
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 5e-3


def test_matrix_products_in_float32_do_not_round_to_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    set_float32_precision()
    a, b = torch.randn(2, 512, 512, device="cuda")
    exact = a.double() @ b.double()
    assert float((a @ b - exact).norm() / exact.norm()) < 1e-5  # TF32 gives 3e-4
