"""Unfused cross-entropy: used for router tuning, and the reference for the fused LM-head loss
(model/cross_entropy.py)."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [L, vocab], labels [L] -> float32 [L]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
