"""Hybrid attention over a pack: text and understanding pictures causal, pictures of generation full within themselves.

All of it is one rule (sequence/pack.py): token q sees token k iff sample[q] == sample[k] and position[k] <= limit[q].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emma_train.sequence.pack import PackedBatch


def hybrid_mask(batch: PackedBatch) -> Tensor:
    """bool [T, T]: whether the row's token sees the column's."""
    same = batch.sample[:, None] == batch.sample[None, :]
    return same & (batch.position[None, :] <= batch.limit[:, None])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense reference. q: [T, heads, d]; k, v: [T, kv_heads, d]; mask: bool [T, T] -> [T, heads, d]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.squeeze(0).transpose(0, 1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves as Qwen3 does. x: [T, heads, d]; cos, sin: [T, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None, :] + turned * sin[:, None, :]


def rotary_tables(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [T], computed in float32: each [T, head_dim]."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position.device).float() / head_dim
    angles = position.float()[:, None] / theta**powers
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
