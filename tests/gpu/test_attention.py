"""Attention kernels on a GPU, in bf16, against the dense reference in float32: values, gradients, determinism."""

import numpy as np
import pytest
import torch
from torch import Tensor

from emma_train.model.attention import MaskPlan, attention, build_plan, hybrid_mask, select_backend
from emma_train.model.emma import Emma
from emma_train.model.varlen import FLASH, find_kernel
from emma_train.sequence.pack import PackedBatch, pack
from emma_train.sequence.spans import full_call
from tests.helpers import i2t_sample, it2i_sample, random_sample, randomise, t2i_sample, tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HEADS, KV_HEADS, DIM = 8, 2, 128


def packs() -> list[PackedBatch]:
    rng = np.random.default_rng(0)
    mixed = [i2t_sample("u", [(16, 16)]), t2i_sample("t", (16, 12)), it2i_sample("e")]
    return [pack([random_sample(rng, f"s{i}") for i in range(12)]) for _ in range(4)] + [pack(mixed), pack(mixed[:1])]


def run(batch: PackedBatch, backend: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch.num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, weight = (torch.randn(shape, generator=generator).bfloat16().to(CUDA, dtype) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    plan = MaskPlan(hybrid_mask(batch)) if backend == "dense" else build_plan(batch, backend=backend)
    out = attention(q, k, v, plan)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
def test_a_kernel_in_bf16_is_as_near_to_float32_as_the_dense_one_in_bf16(backend: str) -> None:
    for batch in (batch.to(CUDA) for batch in packs()):
        exact = run(batch, "dense", torch.float32)
        usual = run(batch, "dense", torch.bfloat16)
        for got, want, dense in zip(run(batch, backend, torch.bfloat16), exact, usual, strict=True):
            error, allowed = (got.float() - want).abs().max(), (dense.float() - want).abs().max()
            assert error <= 2 * allowed + 1e-3


def test_flex_in_float32_equals_the_dense_mask() -> None:
    for batch in (batch.to(CUDA) for batch in packs()):
        for got, want in zip(run(batch, "flex", torch.float32), run(batch, "dense", torch.float32), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_auto_takes_flash_and_says_which() -> None:
    assert select_backend("auto", CUDA, torch.bfloat16) == "flash"
    assert find_kernel("cuda") is find_kernel("cuda")
    assert len(FLASH) == 3


@pytest.mark.parametrize("head_dim", [64, 72])
def test_images_of_any_size_through_the_kernel(head_dim: int) -> None:
    lengths = [64, 1024, 16, 256]
    call = full_call(lengths).to(CUDA)
    q, k, v = (torch.randn(sum(lengths), 4, head_dim, device=CUDA).bfloat16() for _ in range(3))
    got = find_kernel("cuda")(q, k, v, call).split(lengths)
    for one, *parts in zip(got, *(x.split(lengths) for x in (q, k, v)), strict=True):
        parts = [x.float().transpose(0, 1) for x in parts]
        want = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
        torch.testing.assert_close(one.float(), want, rtol=2e-2, atol=2e-2)


def test_the_model_gives_the_same_losses_with_every_backend() -> None:
    batch = packs()[4].to(CUDA)
    model = Emma(tiny_model(decoder={"head_dim": 32}))
    randomise(model)
    model = model.to(CUDA, torch.bfloat16)
    latents = torch.randn(sum(batch.counts[1:]), model.config.autoencoder.channels, device=CUDA).bfloat16()
    time = torch.full((batch.counts[3],), 0.5, device=CUDA)
    losses = {}
    for backend in ("flash", "flex", "sdpa"):
        model.backend = model.vision.backend = backend
        losses[backend] = model(batch, latents, time, losses=True).text_losses.mean()
    for backend in ("flash", "flex"):
        torch.testing.assert_close(losses[backend], losses["sdpa"], rtol=2e-2, atol=0)
