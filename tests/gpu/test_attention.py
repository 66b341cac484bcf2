"""Attention kernels on a GPU, in bf16, against the dense reference in float32: values, gradients, determinism."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from emma_train.config.schema import VisionConfig
from emma_train.model import varlen
from emma_train.model.attention import MaskPlan, attention, build_plan, hybrid_mask, select_backend
from emma_train.model.emma import Emma
from emma_train.model.varlen import KERNELS, Kernel, find_kernel
from emma_train.model.vision import Images, VisionLayer
from emma_train.sequence.pack import PackedBatch, pack
from emma_train.sequence.spans import VarlenCall, full_call
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
            assert relative(got, want) <= 2 * relative(dense, want) + 1e-3


def test_flex_in_float32_equals_the_dense_mask() -> None:
    for batch in (batch.to(CUDA) for batch in packs()):
        for got, want in zip(run(batch, "flex", torch.float32), run(batch, "dense", torch.float32), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def kernels(head_dim: int) -> list[Kernel]:
    """Every installed kernel that the table calls right for heads of this size on this card."""
    card = torch.cuda.get_device_capability()[0]
    usable = [(kernel, varlen._import(kernel)) for kernel in KERNELS if kernel.supports(card, head_dim)]
    return [varlen._adapted(kernel, function) for kernel, function in usable if function is not None]


def test_auto_takes_flash() -> None:
    assert select_backend("auto", CUDA, torch.bfloat16) == "flash"
    assert find_kernel(torch.device("cuda", 0), 72) is not None


def assert_as_near_as_dense(call: VarlenCall, shape: tuple[int, int, int], kernel: Kernel) -> None:
    """Output and gradients of a kernel in bf16 are as near to float32 as torch's dense attention in bf16 is."""
    heads, kv_heads, head_dim = shape
    sizes = [(call.num_q, heads), (call.num_k, kv_heads), (call.num_k, kv_heads)]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*size, head_dim, generator=generator).bfloat16().to(CUDA) for size in sizes]
    weight = torch.randn(call.num_q, heads, head_dim, generator=generator).bfloat16().to(CUDA)

    def run(attend: Kernel, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = attend(q, k, v, call)
        return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), (q, k, v))]

    exact, dense = run(dense_runs, torch.float32), run(dense_runs, torch.bfloat16)
    for name, got, want, usual in zip(["o", "dq", "dk", "dv"], run(kernel, torch.bfloat16), exact, dense, strict=True):
        error, allowed = relative(got, want), relative(usual, want)
        assert error <= 2 * allowed + 1e-3, f"{name}: {error:.4f}, dense in bf16 {allowed:.4f}"


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def dense_runs(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall) -> Tensor:
    """Each run of a call by matrix products and a softmax, in the inputs' own precision."""
    groups, outputs = q.shape[1] // k.shape[1], []
    lengths = [starts.diff().tolist() for starts in (call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k)]
    for q_run, k_run, v_run in zip(*(x.split(sizes) for x, sizes in zip((q, k, v), lengths, strict=True)), strict=True):
        k_run, v_run = (x.repeat_interleave(groups, dim=1) for x in (k_run, v_run))
        scores = torch.einsum("qhd,khd->hqk", q_run, k_run) * q.shape[-1] ** -0.5
        if call.causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(~seen.tril(scores.shape[2] - scores.shape[1]), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.float().softmax(-1).to(q.dtype), v_run))
    return torch.cat(outputs)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_gradients_of_every_kernel_at_every_size_of_heads(head_dim: int, heads: int, kv_heads: int) -> None:
    """72 is the vision encoder's; flash-attn 4 on Hopper gives a wrong dq there and at 104, so the table leaves it
    out."""
    assert kernels(head_dim)
    for kernel in kernels(head_dim):
        assert_as_near_as_dense(full_call([64, 1024, 16, 256], CUDA), (heads, kv_heads, head_dim), kernel)


def test_gradients_of_every_kernel_on_the_calls_of_a_pack() -> None:
    """Causal runs with more keys than queries, as text after an image has."""
    for call in packs()[4].spans.to(CUDA).calls:
        for kernel in kernels(DIM):
            assert_as_near_as_dense(call, (HEADS, KV_HEADS, DIM), kernel)


def test_the_vision_encoder_s_gradients_by_kernel_and_by_torch_s_attention() -> None:
    """At SigLIP2's own 16 heads of 72."""
    torch.manual_seed(0)
    layer = VisionLayer(VisionConfig()).to(CUDA, torch.bfloat16)
    lengths = [1024, 256, 64]
    x = torch.randn(sum(lengths), 1152, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn_like(x)

    def run(images: Images, module: VisionLayer, inputs: Tensor) -> list[Tensor]:
        inputs = inputs.detach().requires_grad_()
        parameters = dict(module.named_parameters())
        out = (module(inputs, images) * weight.to(inputs.dtype)).sum()
        return list(torch.autograd.grad(out, [inputs, *parameters.values()]))

    exact = run(Images(lengths, None), copy.deepcopy(layer).float(), x.float())
    usual = run(Images(lengths, None), layer, x)
    for got, want, torchs in zip(run(Images(lengths, full_call(lengths, CUDA)), layer, x), exact, usual, strict=True):
        assert relative(got, want) <= 2 * relative(torchs, want) + 1e-3


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
