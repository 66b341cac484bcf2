"""Random numbers as a function of (seed, key), so that a record does not depend on the records made before it."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")


def seeded_generator(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], "big"))


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def pick_some(rng: np.random.Generator, options: Sequence[_T], count: int) -> list[_T]:
    """Up to `count` different options in a random order."""
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]
