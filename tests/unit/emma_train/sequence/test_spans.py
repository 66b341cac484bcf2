"""Spans: the two calls see exactly what the mask of a pack says, and every row goes in and comes back once."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_train.model.attention import hybrid_mask
from emma_train.sequence.pack import PackedBatch, pack
from tests.helpers import i2t_sample, it2i_sample, random_sample, t2i_sample


def mask_of(batch: PackedBatch) -> torch.Tensor:
    """How often each row's query meets each row's key in the calls: int64 [T, T]."""
    spans = batch.spans
    seen = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.int64)
    at_q = at_k = 0
    for call in spans.calls:
        for q0, q1, k0, k1 in zip(
            call.cu_seqlens_q, call.cu_seqlens_q[1:], call.cu_seqlens_k, call.cu_seqlens_k[1:], strict=False
        ):
            num_q, num_k = int(q1 - q0), int(k1 - k0)
            rows, keys = spans.query_order[at_q + q0 : at_q + q1], spans.keys[at_k + k0 : at_k + k1]
            pairs = torch.ones(num_q, num_k, dtype=torch.int64)
            seen[rows[:, None], keys[None, :]] += pairs.tril(num_k - num_q) if call.causal else pairs
        at_q, at_k = at_q + call.num_q, at_k + call.num_k
    return seen


@given(st.integers(0, 10**6))
def test_each_permitted_pair_is_seen_once_and_no_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = pack([random_sample(rng, f"s{i}") for i in range(int(rng.integers(1, 6)))])
    assert torch.equal(mask_of(batch), hybrid_mask(batch).long())


@given(st.integers(0, 10**6))
def test_rows_come_back_and_gradients_find_every_copy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = pack([random_sample(rng, f"s{i}") for i in range(3)])
    spans, num = batch.spans, batch.num_tokens
    assert torch.equal(spans.query_order[spans.inverse_order], torch.arange(num))
    padded = torch.cat([spans.keys, torch.tensor([-1])])[spans.key_copies]
    is_copy = padded == torch.arange(num)[:, None]
    assert torch.equal(is_copy, padded >= 0)
    assert torch.equal(is_copy.sum(1), torch.bincount(spans.keys, minlength=num))
    assert sum(call.num_q for call in spans.calls) == num
    assert sum(call.num_k for call in spans.calls) == len(spans.keys)
    for call in spans.calls:
        assert call.max_seqlen_q == int(call.cu_seqlens_q.diff().max()) and call.max_seqlen_k == int(
            call.cu_seqlens_k.diff().max()
        )


def test_understanding_is_one_causal_sequence_per_sample_and_generation_adds_one_full_one_per_image() -> None:
    understanding = pack([i2t_sample("a"), i2t_sample("b")]).spans
    assert [(call.causal, len(call.cu_seqlens_q) - 1) for call in understanding.calls] == [(True, 2)]
    assert len(understanding.keys) == sum(call.num_q for call in understanding.calls)
    generation = pack([t2i_sample("a"), it2i_sample("b")]).spans
    # The prompt of a; text before and after the reference of b; target, reference and target.
    assert [(call.causal, len(call.cu_seqlens_q) - 1) for call in generation.calls] == [(True, 3), (False, 3)]
