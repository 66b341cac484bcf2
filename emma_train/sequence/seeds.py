"""Contract 1: every random value of a sample is a pure function of (seed, epoch, sample key, name of the value).

It does not depend on rank, worker, world size or resume. Seeds are part of the batch; objectives/counter_rng.py makes
tensors from them on the device.
"""

import hashlib


def seed_of(seed: int, epoch: int, key: str, what: str) -> int:
    """A 63-bit seed for the random value `what` of a sample."""
    text = f"{seed}\0{epoch}\0{key}\0{what}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniform_of(seed: int, epoch: int, key: str, what: str) -> float:
    """A number in [0, 1) for the random value `what` of a sample."""
    return (seed_of(seed, epoch, key, what) >> 10) / float(1 << 53)


def choice_of(num: int, seed: int, epoch: int, key: str, what: str) -> int:
    """One of range(num) for the random value `what` of a sample."""
    return seed_of(seed, epoch, key, what) % num
