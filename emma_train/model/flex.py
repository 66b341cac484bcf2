"""Attention by FlexAttention: the rule of the hybrid mask compiled into the kernel, blocks that nobody sees left out.

Packs differ in length; they are padded to whole blocks and compiled for any number of them, once.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from emma_train.sequence.pack import PackedBatch

BLOCK = 128


@dataclass
class FlexPlan:
    """The block mask of one pack."""

    mask: BlockMask
    padded: int
    """Rows of the padded stream."""


def prepare_flex(batch: PackedBatch) -> FlexPlan:
    """The block mask of the pack's rule; padding belongs to no sample and sees itself."""
    # A single block would be compiled apart from several.
    missing = max(2 * BLOCK, -(-batch.num_tokens // BLOCK) * BLOCK) - batch.num_tokens
    sample = F.pad(batch.sample, (0, missing), value=-1)
    position, limit = F.pad(batch.position, (0, missing)), F.pad(batch.limit, (0, missing))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (sample[q] == sample[k]) & (position[k] <= limit[q])

    padded = batch.num_tokens + missing
    device = batch.sample.device.type
    return FlexPlan(_block_mask(device)(rule, None, None, padded, padded, device=device, BLOCK_SIZE=BLOCK), padded)


def flex(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan) -> Tensor:
    """q: [T, heads, d]; k, v: [T, kv_heads, d] -> [T, heads, d]."""
    num = len(q)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, plan.padded - num)).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = _compiled()(q, k, v, block_mask=plan.mask, enable_gqa=True)
    return out[0, :, :num].transpose(0, 1)


@lru_cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=True)


@lru_cache
def _block_mask(device: str):  # type: ignore[no-untyped-def]
    # Compiled, it never holds the whole square; on a CPU, where only tests go, compiling costs more than it saves.
    return torch.compile(create_block_mask, dynamic=True) if device == "cuda" else create_block_mask
