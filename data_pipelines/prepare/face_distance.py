"""How far faces before and after an edit are from each other."""

import math
from collections.abc import Sequence

import numpy as np

Embedding = Sequence[float]
"""128 numbers of dlib's face recognition network. Two of one person are nearer than SAME_PERSON."""
SAME_PERSON = 0.6
"""Euclidean distance, dlib's own threshold."""


def farthest_face(before: Sequence[Embedding], after: Sequence[Embedding]) -> float | None:
    """The largest distance of a face before to its nearest face after; infinite where none is left, None where none was
    before."""
    if not len(before):
        return None
    if not len(after):
        return math.inf
    differences = np.asarray(before, np.float64)[:, None] - np.asarray(after, np.float64)[None]
    return float(np.linalg.norm(differences, axis=2).min(axis=1).max())
