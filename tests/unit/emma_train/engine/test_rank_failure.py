"""A store that never answers, as where the process that keeps it is stopped; keys that all ranks share."""

import errno
import os
import socket
import threading

import pytest

from emma_train.engine import rank_failure
from emma_train.engine.rank_failure import report_failure, store_gone, store_key


class SilentStore:
    """Its calls never return."""

    def set(self, key: str, value: str) -> None:
        threading.Event().wait()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms"), store_gone(1, 3)),
        (ValueError("a mistake on this rank"), None),
    ],
)
def test_a_rank_does_not_wait_for_a_store_that_hangs(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str | None
) -> None:
    monkeypatch.setattr(rank_failure, "default_store", SilentStore)
    monkeypatch.setattr(rank_failure, "STORE_S", 0.1)
    failure = report_failure(error, 1, 3)
    assert (None if failure is None else str(failure)) == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "rank 0 of 3 died: the store that it keeps does not answer"),  # its process is stopped
        (errno.ECONNREFUSED, "rank 0 of 3 died: the store that it keeps does not answer"),
        (errno.EHOSTUNREACH, "rank 2 of 3 cannot reach 10.9.9.9, where rank 0 keeps the store"),
        (errno.ETIMEDOUT, "rank 2 of 3 cannot reach 10.9.9.9, where rank 0 keeps the store"),
    ],
)
def test_a_rank_that_may_be_cut_off_does_not_blame_rank_0(
    monkeypatch: pytest.MonkeyPatch, error: int | None, said: str
) -> None:
    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        assert address == ("10.9.9.9", 29500)
        if error is not None:
            raise OSError(error, os.strerror(error))
        return socket.socket()

    monkeypatch.setenv("MASTER_ADDR", "10.9.9.9")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(socket, "create_connection", connect)
    assert store_gone(2, 3).startswith(said)


def test_agents_that_count_restarts_differently_share_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent counts the failures of its own processes, and not the restarts that another node asks for."""
    keys: dict[str, set[str]] = {"True": set(), "False": set()}
    for agent_store, names in keys.items():
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent_store)
        for count in ("0", "1"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
            names.add(store_key("failed"))
    assert len(keys["False"]) == 1
    assert len(keys["True"]) == 2  # the store has the keys of the start before
