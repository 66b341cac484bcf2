"""The hybrid mask of a pack as two calls of variable-length attention, for kernels that have no masks.

A sample is a sequence of runs: text and understanding images (causal), or one image of generation (full attention
within the image). A run attends to its sample up to the run's end. It is one sequence of a varlen call: its queries are
the run's tokens, its keys are the sample from the start to the run's end. Causal runs are aligned at that end; full
runs need no mask. All causal runs of a pack are one call, all full runs are another. No masked pair is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch


@dataclass
class VarlenCall:
    """One call of a variable-length kernel; its sequences are concatenated."""

    causal: bool
    """If true, query i of n attends to all but the last n - 1 - i keys of its sequence; else to all of them."""
    cu_seqlens_q: torch.Tensor
    """int32 [runs + 1]: where each run's queries start."""
    cu_seqlens_k: torch.Tensor
    """int32 [runs + 1]: where each run's keys start."""
    num_q: int
    num_k: int
    max_seqlen_q: int
    max_seqlen_k: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "VarlenCall":
        """A copy on a device."""
        cu_seqlens_q, cu_seqlens_k = (
            x.to(device, non_blocking=non_blocking) for x in (self.cu_seqlens_q, self.cu_seqlens_k)
        )
        return replace(self, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


@dataclass
class Spans:
    """Index tables between the stream of a pack (T rows) and the varlen calls (T queries, K keys). A key is repeated
    once for each run that attends to it."""

    calls: list[VarlenCall]
    query_order: torch.Tensor
    """int64 [T]: stream row of each query, call after call."""
    inverse_order: torch.Tensor
    """int64 [T]: index of each stream row among the queries."""
    keys: torch.Tensor
    """int64 [K]: stream row of each key, call after call."""
    key_copies: torch.Tensor
    """int64 [T, most runs that attend to a row]: indices of each stream row among the keys, padded with K."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Spans":
        """A copy on a device."""

        def moved(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=non_blocking)

        calls = [call.to(device, non_blocking) for call in self.calls]
        return Spans(
            calls, moved(self.query_order), moved(self.inverse_order), moved(self.keys), moved(self.key_copies)
        )


def spans(sample: np.ndarray, position: np.ndarray, limit: np.ndarray) -> Spans:
    """From a pack's tables, int64 [T] each (sequence/pack.py). Positions of a sample have no gaps."""
    num = len(sample)
    order = np.lexsort((position, sample))
    owner, at, end = sample[order], position[order], limit[order]
    new_sample = np.ones(num, dtype=bool)
    new_sample[1:] = owner[1:] != owner[:-1]
    causal = end == at
    # The limit of the last token of a full image is its own position too, but the token before it has the same limit.
    causal[1:] &= new_sample[1:] | (end[:-1] < at[1:])
    new_run = new_sample.copy()
    # A run ends with its sample, where causal turns to full or back, and where one full image follows another.
    new_run[1:] |= (causal[1:] != causal[:-1]) | (~causal[1:] & (end[1:] != end[:-1]))
    first = np.flatnonzero(new_run)
    last = np.append(first[1:], num)
    start = np.flatnonzero(new_sample)[np.cumsum(new_sample)[first] - 1]
    calls, query_order, keys = [], [], []
    for kind in (True, False):
        of_kind = causal[first] == kind
        if not of_kind.any():
            continue
        lengths_q, lengths_k = (last - first)[of_kind], (last - start)[of_kind]
        query_order.append(order[_ranges(first[of_kind], lengths_q)])
        keys.append(order[_ranges(start[of_kind], lengths_k)])
        calls.append(_call(kind, lengths_q, lengths_k))
    rows, seen = np.concatenate([*query_order, order[:0]]), np.concatenate([*keys, order[:0]])
    inverse_order = np.empty(num, dtype=np.int64)
    inverse_order[rows] = np.arange(num)
    return Spans(
        calls,
        torch.from_numpy(rows),
        torch.from_numpy(inverse_order),
        torch.from_numpy(seen),
        torch.from_numpy(_copies(seen, num)),
    )


def full_call(lengths: Sequence[int], device: torch.device) -> VarlenCall:
    """Sequences of these lengths, each full within itself. Made on the device, so that nothing is copied there."""
    parts, start = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for length, run in groupby(lengths):
        stop = start + length * len(list(run))
        parts.append(torch.arange(start + length, stop + 1, length, dtype=torch.int32, device=device))
        start = stop
    starts, longest = torch.cat(parts), max(lengths)
    return VarlenCall(False, starts, starts, start, start, longest, longest)


def _call(causal: bool, lengths_q: np.ndarray, lengths_k: np.ndarray) -> VarlenCall:
    return VarlenCall(
        causal,
        cu_seqlens_q=_starts(lengths_q),
        cu_seqlens_k=_starts(lengths_k),
        num_q=int(lengths_q.sum()),
        num_k=int(lengths_k.sum()),
        max_seqlen_q=int(lengths_q.max()),
        max_seqlen_k=int(lengths_k.max()),
    )


def _copies(keys: np.ndarray, num: int) -> np.ndarray:
    by_row = np.argsort(keys, kind="stable")
    counts = np.bincount(keys, minlength=num)
    table = np.full((num, int(counts.max(initial=0))), len(keys), dtype=np.int64)
    nth = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[keys[by_row], nth] = by_row
    return table


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one after another."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - offsets, lengths)


def _starts(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
