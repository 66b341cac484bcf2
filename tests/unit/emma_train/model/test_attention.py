"""Hybrid attention: every backend against the dense and a row-by-row reference; rotary embedding by its definition."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from emma_train.errors import UserError
from emma_train.model import flex
from emma_train.model.attention import (
    AttentionPlan,
    MaskPlan,
    attention,
    build_plan,
    hybrid_mask,
    prepare_masks,
    rotary,
    rotary_tables,
    select_backend,
)
from emma_train.sequence.pack import PackedBatch, pack
from tests.helpers import i2t_sample, random_sample, t2i_sample

HEADS, KV_HEADS, DIM = 4, 2, 8
FLEX = flex_attention.flex_attention


def random_pack(seed: int, copies: int = 1) -> PackedBatch:
    rng = np.random.default_rng(seed)
    return pack([random_sample(rng, f"s{i}") for i in range(int(rng.integers(1, 4)))] * copies)


def reference(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """One row and one head at a time, straight from the rule."""
    rows = []
    sample, position, limit = batch.sample.tolist(), batch.position.tolist(), batch.limit.tolist()
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if sample[j] == sample[i] and position[j] <= limit[i]]
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // KV_HEADS)
            weights = torch.softmax(k[seen, g] @ q[i, h] / math.sqrt(DIM), 0)
            heads.append(weights @ v[seen, g])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@given(st.integers(0, 10**6))
def test_padded_dense_and_row_by_row_agree_in_value_and_gradient(seed: int) -> None:
    # The more samples of one length, the cheaper padding: with four copies of up to three samples it always wins.
    batch = random_pack(seed, copies=4)
    plan = prepare_masks(batch)
    assert plan.rows is not None
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch.num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, weight = (torch.randn(shape, generator=generator) for shape in shapes)

    def run(form: str) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if form == "reference":
            out = reference(*inputs, batch)
        else:
            out = attention(*inputs, plan if form == "padded" else MaskPlan(hybrid_mask(batch)))
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]

    expected = run("reference")
    for form in ("dense", "padded"):
        for number, (got, want) in enumerate(zip(run(form), expected, strict=True)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 if number == 0 else 5e-6)


def gradients(batch: PackedBatch, seed: int, plan: AttentionPlan) -> list[Tensor]:
    """Output and gradients of q, k and v for random inputs and a random weight of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch.num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, plan)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


@given(st.integers(0, 10**6))
def test_spans_and_dense_agree_in_value_and_gradient(seed: int) -> None:
    batch = random_pack(seed)
    expected = gradients(batch, seed, MaskPlan(hybrid_mask(batch)))
    for got, want in zip(gradients(batch, seed, build_plan(batch, backend="flash")), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)


@pytest.mark.seconds
@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_flex_and_dense_agree_in_value_and_gradient(seed: int) -> None:
    batch = random_pack(seed)
    # torch refuses flex's backward on a CPU by a check alone; uncompiled, it is the same mathematics.
    with patch.object(flex_attention, "_validate_device"), patch.object(flex, "_compiled", lambda: FLEX):
        got = gradients(batch, seed, build_plan(batch, backend="flex"))
    for gradient, want in zip(got, gradients(batch, seed, MaskPlan(hybrid_mask(batch))), strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=5e-6)


@pytest.mark.seconds
def test_fifty_packs_run_one_compiled_flex_kernel() -> None:
    torch._dynamo.reset()
    counters.clear()
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(50):
        batch = pack([random_sample(rng, f"s{i}") for i in range(int(rng.integers(1, 20)))])
        q, k, v = (torch.randn(batch.num_tokens, heads, 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
        with torch.no_grad():
            got = attention(q, k, v, build_plan(batch, backend="flex"))
        torch.testing.assert_close(got, attention(q, k, v, MaskPlan(hybrid_mask(batch))), rtol=1e-5, atol=5e-6)
        sizes.add(batch.num_tokens)
    assert len(sizes) > 40
    assert counters["stats"]["unique_graphs"] == 1


def test_a_recipe_s_backend_becomes_one_that_runs_there_or_an_error() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [select_backend("auto", device, torch.bfloat16) for device in (cpu, cuda)] == ["sdpa", "flash"]
    assert select_backend("auto", cuda, torch.float32) == "flex"
    assert select_backend("sdpa", cuda, torch.bfloat16) == "sdpa"
    for backend, device, dtype in (
        ("flash", cpu, torch.bfloat16),
        ("flex", cpu, torch.float32),
        ("flash", cuda, torch.float32),
    ):
        with pytest.raises(UserError, match=f"attention.backend={backend} .*attention.backend=auto"):
            select_backend(backend, device, dtype)


def test_prepare_takes_the_cheaper_form() -> None:
    even = pack([t2i_sample(f"p{i}") for i in range(6)])
    assert prepare_masks(even).rows is not None
    uneven = pack([i2t_sample("long", [(8, 8)]), *(i2t_sample(f"q{i}", [], answer="a") for i in range(3))])
    assert prepare_masks(uneven).rows is None
    assert prepare_masks(pack([t2i_sample()])).rows is None


def test_the_mask_of_a_small_pack_written_by_hand() -> None:
    batch = pack([t2i_sample("a", (1, 2), text="x")])
    text = batch.counts[0]
    mask = hybrid_mask(batch)
    assert torch.equal(mask[:text, :text], torch.ones(text, text).tril().bool())
    assert not mask[:text, text:].any() and mask[text:].all()


def test_rotary_turns_pairs_by_position_over_theta() -> None:
    position = torch.tensor([0, 1, 7, 1000])
    x = torch.randn(4, 2, DIM)
    turned = rotary(x, *rotary_tables(position, DIM, 10000.0, torch.float32))
    pairs = torch.complex(x[..., : DIM // 2].double(), x[..., DIM // 2 :].double())
    angles = position[:, None, None] / 10000.0 ** (torch.arange(DIM // 2).double() * 2 / DIM)
    want = pairs * torch.polar(torch.ones_like(angles), angles)
    got = torch.complex(turned[..., : DIM // 2].double(), turned[..., DIM // 2 :].double())
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)
    assert torch.equal(turned[0], x[0])


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, DIM), torch.randn(1, 1, DIM)
    scores = []
    for start in (0, 5, 90):
        cos, sin = rotary_tables(torch.tensor([start + 4, start]), DIM, 10000.0, torch.float32)
        scores.append(float((rotary(q, cos[:1], sin[:1]) * rotary(k, cos[1:], sin[1:])).sum()))
    assert max(scores) - min(scores) < 1e-5


def test_bf16_on_a_cpu_is_computed_in_float32() -> None:
    batch = random_pack(3)
    q, k, v = (torch.randn(batch.num_tokens, heads, DIM).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS))
    plan = MaskPlan(hybrid_mask(batch))
    exact = attention(q.float(), k.float(), v.float(), plan)
    assert torch.equal(attention(q, k, v, plan), exact.bfloat16())


@pytest.mark.parametrize("seed", range(3))
def test_a_pack_equals_its_samples_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [random_sample(rng, f"s{i}") for i in range(3)]
    batch = pack(samples)
    q, k, v = (torch.randn(batch.num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    together = attention(q, k, v, build_plan(batch))
    for index, sample in enumerate(samples):
        of_sample = batch.sample == index
        alone = attention(q[of_sample], k[of_sample], v[of_sample], build_plan(pack([sample])))
        torch.testing.assert_close(together[of_sample], alone, rtol=1e-6, atol=1e-6)
