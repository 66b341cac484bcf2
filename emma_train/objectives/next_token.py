"""Cross-entropy in its plain form: of router tuning, and the reference of text's, which is fused with the LM head
(model/cross_entropy.py)."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [L, vocab], labels [L] -> float32 [L]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
