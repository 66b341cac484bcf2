"""Which rank is gone, when the others can no longer talk to it.

A rank that fails leaves its last words in the store of the process group. One that lost contact says so there, waits
for the others to do the same, and names those who said something else or nothing.
"""

import os
import time
from collections.abc import Mapping

import torch.distributed as dist

from emma_train.errors import RankFailure

PATIENCE_S = 10.0
"""How long the others may take to notice."""
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting")
_CONTACT = "lost contact"


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that other ranks cannot be reached, rather than what is wrong here."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(sign in str(error) for sign in _SIGNS)


def report_failure(error: BaseException, rank: int, size: int) -> RankFailure | None:
    """Leave this rank's last words; where contact was lost, who is to blame."""
    if size == 1:
        return None
    lost = is_lost_contact(error)
    key = f"emma/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
    try:
        store = dist.distributed_c10d._get_default_store()
        text = _CONTACT if lost else (str(error).strip().splitlines() or [type(error).__name__])[0]
        store.set(f"{key}{rank}", text)
        if not lost:
            return None
        said = _gather(store, key, size)
        store.set(f"{key}{rank}/read", "")
        if rank == 0:  # whose process may hold the store
            _wait_for(store, [f"{key}{other}/read" for other, words in said.items() if words == _CONTACT])
    except dist.DistError:
        return RankFailure(f"rank 0 of {size} died: the store that it keeps does not answer")
    if rank != min(other for other, words in said.items() if words == _CONTACT):
        return RankFailure()
    return RankFailure(describe(said, size))


def describe(said: Mapping[int, str], size: int) -> str:
    """What ended a run, from the last words of the ranks that had any."""
    parts = [f"rank {rank} of {size} failed: {words}" for rank, words in sorted(said.items()) if words != _CONTACT]
    silent = [str(rank) for rank in range(size) if rank not in said]
    if silent:
        few = ", ".join(silent[:8]) + (f" and {len(silent) - 8} more" if silent[8:] else "")
        who, hang = ("ranks", "hang") if silent[1:] else ("rank", "hangs")
        parts.append(f"{who} {few} of {size} died or {hang}: no answer in {PATIENCE_S:g} s")
    return "; ".join(parts) or f"all {size} ranks lost contact at once, as when a network fails"


def _gather(store: dist.Store, key: str, size: int) -> dict[int, str]:
    deadline = time.monotonic() + PATIENCE_S
    said: dict[int, str] = {}
    while len(said) < size and time.monotonic() < deadline:
        for rank in range(size):
            if rank not in said and store.check([f"{key}{rank}"]):
                said[rank] = store.get(f"{key}{rank}").decode()
        time.sleep(0.1)
    return said


def _wait_for(store: dist.Store, keys: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(store.check([key]) for key in keys) and time.monotonic() < deadline:
        time.sleep(0.1)
