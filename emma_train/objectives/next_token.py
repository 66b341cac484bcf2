"""Unfused cross-entropy: used for router tuning, and the reference for the fused LM-head loss
(model/cross_entropy.py)."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """logits [L, vocab], labels [L] -> float32 [L]; 0 where the label is `ignored`."""
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=ignored)
