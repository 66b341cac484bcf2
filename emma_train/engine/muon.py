"""Muon (kellerjordan.github.io/posts/muon): the momentum of a matrix, brought to singular values near 1, is its update.

Pure functions: which parameters take it, the Newton-Schulz iteration, the scale of an update, and which rank computes
which matrix.
"""

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod, sqrt

import torch
from torch import Tensor

from emma_train.config.schema import MuonConfig, OptimizerConfig

HIDDEN_MATRICES = ("decoder.layers.", "vision.layers.", "vision.stem_layers.", "und_adapter.", "gen_adapter.")
"""Prefixes of the names of parameters whose matrices take Muon. Not among them: embedding, heads, router, position
table and patch embedding, which AdamW updates like every vector. The model keeps queries, keys and values, gate and up,
and the modules of each branch and expert apart, so each parameter is one matrix to orthogonalise."""
EPSILON = 1e-7
"""Smallest norm that a matrix is divided by; torch.optim.Muon has the same."""


def takes_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter takes Muon where optimizer.kind is muon; all others take AdamW."""
    return len(shape) == 2 and name.startswith(HIDDEN_MATRICES)


def optimizer_lines(config: OptimizerConfig, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Where there is Muon, a line for it and one for AdamW: which of the trainable parameters, by name and shape, each
    of them takes. Layers are one entry, as in decoder.layers.*.und.q_proj x 36."""
    lines: list[str] = []
    if config.kind == "adamw":
        return lines
    for title, is_muon in (("Muon", True), ("AdamW", False)):
        taken = {name: shape for name, shape in shapes.items() if takes_muon(name, shape) == is_muon}
        matrices = [name for name, shape in taken.items() if len(shape) > 1]
        patterns = Counter(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in matrices)
        entries = [pattern + f" x {count}" * (count > 1) for pattern, count in patterns.items()]
        if vectors := len(taken) - len(matrices):
            entries.append(f"{vectors} vectors (norms, biases)")
        lines.append(f"{title}: {sum(map(prod, taken.values())):,} parameters: {', '.join(entries) or 'none'}")
    return lines


def newton_schulz(matrix: Tensor, config: MuonConfig) -> Tensor:
    """The matrix with all singular values near 1, by Newton-Schulz in the matrix's own type: [m, n] -> [m, n].

    In bf16 it is what torch.optim.Muon computes, bit for bit.
    """
    a, b, c = config.coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(config.iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def update_scale(shape: Sequence[int], config: MuonConfig) -> float:
    """What an orthogonal matrix is multiplied by, so that the root mean square of its entries is config.update_rms.

    A full-rank [m, n] with singular values 1 has the root mean square 1 / sqrt(max(m, n)) (arXiv 2502.16982, 2.2).
    """
    return config.update_rms * sqrt(max(shape))


def assign_owners(costs: Sequence[int], num_ranks: int) -> list[int]:
    """The rank that computes each matrix: the most expensive first, each to the rank with the least work so far."""
    owners = [0] * len(costs)
    least_first = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[index] = heapq.heappop(least_first)
        heapq.heappush(least_first, (load + costs[index], owners[index]))
    return owners


def owner_loads(costs: Sequence[int], owners: Sequence[int], num_ranks: int) -> list[int]:
    """The cost that each rank has by `owners`."""
    loads = [0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads
