"""Next-token prediction: cross-entropy of supervised text (paper §2.2)."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [L, vocab], labels [L] -> float32 [L]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
