"""Which rank failed, when the others can no longer reach it.

Every rank that fails writes its error into the store of the default process group. A rank that lost contact with others
writes that, waits until the others have written something, and names the ranks that wrote another error or nothing.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from emma_train.engine.torch_private import default_store
from emma_train.errors import RankFailure

PATIENCE_S = 10.0
"""How long the other ranks may take to notice the failure."""
STORE_S = 2 * PATIENCE_S + 5
"""How long all calls of the store may take: it answers in milliseconds, and this rank waits twice for others."""
REACH_S = 2.0
"""How long a machine may take to answer who connects."""
_LOST_CONTACT_TEXTS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting")
_LOST_CONTACT = "lost contact"


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error means that other ranks cannot be reached, rather than that this rank failed."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _LOST_CONTACT_TEXTS)


def report_failure(error: BaseException, rank: int, size: int) -> RankFailure | None:
    """Publish the error of this rank. If it lost contact, return the error to raise instead, which names the ranks that
    failed (without a text on all ranks but one, so that it is printed once)."""
    if size == 1:
        return None
    results: list[RankFailure | None] = []
    # A call of a store whose process is stopped, or whose machine is cut off, never returns.
    thread = threading.Thread(
        target=lambda: results.append(_report_failure(error, rank, size)), name="rank-failure", daemon=True
    )
    thread.start()
    thread.join(STORE_S)
    if results:
        return results[0]
    return RankFailure(store_gone(rank, size)) if is_lost_contact(error) else None


def _report_failure(error: BaseException, rank: int, size: int) -> RankFailure | None:
    """The same, for as long as the store takes."""
    lost_contact = is_lost_contact(error)
    key = store_key("")
    try:
        store = default_store()
        message = _LOST_CONTACT if lost_contact else (str(error).strip().splitlines() or [type(error).__name__])[0]
        store.set(f"{key}{rank}", message)
        if not lost_contact:
            store.set(store_key("failed"), f"rank {rank} of {size} failed: {message}")  # for engine/heartbeat.py
            return None
        messages = _gather_messages(store, key, size)
        without_contact = [other for other, text in messages.items() if text == _LOST_CONTACT]
        failure = RankFailure(describe_failure(messages, size)) if rank == min(without_contact) else RankFailure()
        if str(failure):
            store.set(store_key("failed"), str(failure))  # engine/heartbeat.py ends a rank that hangs
        store.set(f"{key}{rank}/read", "")
        if rank == 0:  # its process may hold the store, which the others still read
            _wait_for_keys(store, [f"{key}{other}/read" for other in without_contact])
    except dist.DistError:
        return RankFailure(store_gone(rank, size)) if lost_contact else None  # this rank knows why it failed itself
    return failure


def describe_failure(messages: Mapping[int, str], size: int) -> str:
    """One line about what ended a run, from the last message of every rank that wrote one."""
    parts = [
        f"rank {rank} of {size} failed: {text}" for rank, text in sorted(messages.items()) if text != _LOST_CONTACT
    ]
    silent = [rank for rank in range(size) if rank not in messages]
    if silent:
        hang = "hang" if silent[1:] else "hangs"
        parts.append(f"{list_ranks(silent)} of {size} died or {hang}: no answer in {PATIENCE_S:g} s")
    return "; ".join(parts) or f"all {size} ranks lost contact at once, as when a network fails"


def list_ranks(ranks: Sequence[int]) -> str:
    """One name for several ranks, as in "ranks 1, 2"; of more than eight the first eight and how many more."""
    more = f" and {len(ranks) - 8} more" if ranks[8:] else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def store_gone(rank: int, size: int) -> str:
    """One line of this rank about a store that no longer answers. Takes up to REACH_S."""
    if can_reach_store():
        return f"rank 0 of {size} died: the store that it keeps does not answer"
    return (
        f"rank {rank} of {size} cannot reach {os.environ['MASTER_ADDR']}, where rank 0 keeps the store: that machine "
        "is down, or one of the two is cut off"
    )


def can_reach_store() -> bool:
    """Whether the machine that keeps the store answers. That of a process that is dead or stopped does; where none
    answers, it may be this machine that is cut off. Takes up to REACH_S."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port:
        return True
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return True


def store_key(name: str) -> str:
    """A key in the store of the process group that belongs to this start of the run.

    A store that torchrun's agent keeps outlives restarts. One that rank 0 keeps does not, and there the counts of
    restarts may differ: an agent does not count those that another node asks for.
    """
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"emma/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_agents else '0'}/{name}"


def _gather_messages(store: dist.Store, key: str, size: int) -> dict[int, str]:
    """Messages by rank, of the ranks that write one in time."""
    deadline = time.monotonic() + PATIENCE_S
    messages: dict[int, str] = {}
    while len(messages) < size and time.monotonic() < deadline:
        for rank in range(size):
            if rank not in messages and store.check([f"{key}{rank}"]):
                messages[rank] = store.get(f"{key}{rank}").decode()
        time.sleep(0.1)
    return messages


def _wait_for_keys(store: dist.Store, keys: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(store.check([key]) for key in keys) and time.monotonic() < deadline:
        time.sleep(0.1)
