"""The environment of a process before NCCL starts."""

import os

import pytest

from emma_train.engine.world import allow_forks


def test_forks_are_allowed_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDMAV_FORK_SAFE", raising=False)
    monkeypatch.setenv("FI_EFA_FORK_SAFE", "0")
    allow_forks()
    assert (os.environ["RDMAV_FORK_SAFE"], os.environ["FI_EFA_FORK_SAFE"]) == ("1", "0")
