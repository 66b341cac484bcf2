"""The LM head and cross-entropy in one: logits exist for a few rows at a time, in forward and again in backward.

All logits of a pack would be its largest tensor by far: 2,048 supervised tokens times 151,936 words are 1.2 GiB in
float32, and cross-entropy holds several of them at once.

Liger's fused loss (0.8.5) is no substitute: where each token keeps a loss of its own, it rounds the token's weight to
bf16, which scales all of the text's gradient by up to 0.4 %, and each pass waits for a count from the device.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256
"""Rows of logits that exist at once: enough to keep a card's matrix units busy."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden: [L, H], weight: [vocab, H], labels: int64 [L] -> float32 [L], cross_entropy(hidden @ weight.T, labels).

    Nothing to predict (L = 0) gives exact zeros to both gradients.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        normaliser, chosen = (torch.empty(len(labels), device=hidden.device) for _ in range(2))
        for rows in _chunks(len(labels)):
            logits = F.linear(hidden[rows], weight).float()
            normaliser[rows] = logits.logsumexp(-1)
            chosen[rows] = logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        return normaliser - chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, labels, normaliser = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Sums over many rows: in float32, as the gradient of one product over all of them would be.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(labels)):
            # grad * (softmax - one-hot), built in the place of the logits.
            logits = F.linear(hidden[rows], weight).float()
            slope = logits.sub_(normaliser[rows, None]).exp_().mul_(grad[rows, None])
            slope.scatter_add_(1, labels[rows, None], -grad[rows, None])
            slope = slope.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[rows] = slope @ weight
            if to_weight is not None:
                to_weight += slope.T @ hidden[rows]
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None


def _chunks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, num_rows, ROWS))
