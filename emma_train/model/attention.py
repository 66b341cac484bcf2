"""Hybrid attention over a pack: text and understanding images causal, images of generation full within themselves.

All of it is one rule (sequence/pack.py): token q sees token k iff sample[q] == sample[k] and position[k] <= limit[q].
`build_plan` turns the tables of a pack into the kernel's input, once for all layers. The backends compute the same:

sdpa     torch's attention with a mask, over the pack or per sample; any device, any precision; the reference
flash    variable-length kernels without masks (model/varlen.py); CUDA in bf16
flex     FlexAttention (model/flex.py); CUDA in any precision
auto     flash where it runs, else sdpa on a CPU and flex on a GPU
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emma_train.errors import UserError
from emma_train.model import flex, varlen
from emma_train.model.cache import KVCache, LayerCache
from emma_train.sequence.pack import PackedBatch
from emma_train.sequence.spans import Spans


@dataclass
class MaskPlan:
    """Either one dense square over the pack, or one small square per sample."""

    mask: Tensor
    """bool [T, T], or [samples, 1, longest, longest]; with a cache [samples, 1, longest, capacity]."""
    rows: Tensor | None = None
    """int64 [T]: row of each token in [samples * longest]; None in the dense form."""
    cache_rows: Tensor | None = None
    """int64 [T]: row of each token in the cache, [samples * capacity]; None without a cache."""


AttentionPlan = MaskPlan | Spans | flex.FlexPlan


def select_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """flash, flex or sdpa for the recipe's attention.backend. Raises UserError if it cannot run on the device."""
    half = dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        return "sdpa" if device.type != "cuda" else "flash" if half else "flex"
    if backend != "sdpa" and device.type != "cuda":
        raise UserError(f"attention.backend={backend} needs an NVIDIA GPU; use attention.backend=auto")
    if backend == "flash" and not half:
        raise UserError("attention.backend=flash computes in bf16; use engine.precision=bf16 or attention.backend=auto")
    return backend


def build_plan(batch: PackedBatch, cache: KVCache | None = None, backend: str = "sdpa") -> AttentionPlan:
    """The tables of a pack that a backend needs. With a cache (generation only) it is always sdpa, sample by sample."""
    if cache is None and backend == "flash":
        return batch.spans
    if cache is None and backend == "flex":
        return flex.prepare_flex(batch)
    return prepare_masks(batch, cache)


def prepare_masks(batch: PackedBatch, cache: KVCache | None = None) -> MaskPlan:
    """The cheaper of the two forms of sdpa."""
    num_samples, longest = len(batch.keys), batch.max_length
    if cache is None and num_samples * longest**2 >= batch.num_tokens**2:
        return MaskPlan(hybrid_mask(batch))
    # Positions of a sample have no gaps, so (sample, position - first position) is a row of a padded table.
    start = batch.position.new_zeros(num_samples)
    start = start.scatter_reduce(0, batch.sample, batch.position, "amin", include_self=False)
    rows = batch.sample * longest + batch.position - start[batch.sample]
    limit = torch.zeros(num_samples * longest, dtype=torch.int64, device=rows.device)
    limit[rows] = batch.limit
    keys = torch.arange(longest if cache is None else cache.capacity, device=rows.device)
    # Padding queries attend to key 0, which always exists. Padding keys are beyond every limit.
    mask = keys <= limit.view(num_samples, 1, longest, 1)
    return MaskPlan(mask, rows, None if cache is None else batch.sample * cache.capacity + batch.position)


def hybrid_mask(batch: PackedBatch) -> Tensor:
    """bool [T, T]: whether the row's token sees the column's. The reference for every other form."""
    same = batch.sample[:, None] == batch.sample[None, :]
    return same & (batch.position[None, :] <= batch.limit[:, None])


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
    """q: [T, heads, d]; k, v: [T, kv_heads, d] -> [T, heads, d]; with a cache, over what is in it too."""
    if isinstance(plan, Spans):
        return varlen.span_attention(q, k, v, plan)
    if isinstance(plan, flex.FlexPlan):
        return flex.flex(q, k, v, plan)
    groups = q.shape[1] // k.shape[1]
    if plan.rows is None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    elif cache is None:
        q, k, v = (_padded(x, plan.rows, plan.mask.shape) for x in (q, k, v))
    else:
        assert plan.cache_rows is not None
        q = _padded(q, plan.rows, plan.mask.shape)
        k, v = cache.add(k, v, plan.cache_rows)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = scaled_dot_product(q, k, v, plan.mask)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if plan.rows is None else out[plan.rows]


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention; on a CPU in float32, because its bf16 backward there is eight times slower."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _padded(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """[T, heads, d] -> [samples, heads, longest, d], zeros where there is no token."""
    table = x.new_zeros(shape[0] * shape[2], *x.shape[1:]).index_copy(0, rows, x)
    return table.view(shape[0], shape[2], *x.shape[1:]).transpose(1, 2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves as Qwen3 does. x: [T, heads, d]; cos, sin: `rotary_tables`."""
    return x * cos[:, None, :] + x.roll(x.shape[-1] // 2, -1) * sin[:, None, :]


def rotary_tables(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [T], computed in float32: each [T, head_dim]. The first half of sin is negative, for
    `rotary`, which exchanges the halves of x."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position.device).float() / head_dim
    angles = position.float()[:, None] / theta**powers
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
