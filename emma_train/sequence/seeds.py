"""Contract 1: whatever is random about a sample is a pure function of (seed, epoch, sample key, what is drawn).

Never of rank, worker, world size or resume. Seeds travel with the batch; tensors are drawn from them on the device
(objectives/draws.py).
"""

import hashlib


def seed_of(seed: int, epoch: int, key: str, what: str) -> int:
    """A 63-bit seed for one draw of one sample."""
    text = f"{seed}\0{epoch}\0{key}\0{what}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniform_of(seed: int, epoch: int, key: str, what: str) -> float:
    """A number in [0, 1) for one draw of one sample."""
    return (seed_of(seed, epoch, key, what) >> 10) / float(1 << 53)


def choice_of(num: int, seed: int, epoch: int, key: str, what: str) -> int:
    """One of range(num) for one draw of one sample."""
    return seed_of(seed, epoch, key, what) % num
