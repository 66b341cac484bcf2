"""The environment of a process before CUDA and NCCL start."""

import os

import pytest

from emma_train.engine.world import allow_forks, use_expandable_segments


def test_forks_are_allowed_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDMAV_FORK_SAFE", raising=False)
    monkeypatch.setenv("FI_EFA_FORK_SAFE", "0")
    allow_forks()
    assert (os.environ["RDMAV_FORK_SAFE"], os.environ["FI_EFA_FORK_SAFE"]) == ("1", "0")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_the_allocator_can_grow_unless_the_user_has_decided(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")  # so that it is restored after the test
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments()
    assert {n: v for n, v in os.environ.items() if n.endswith("ALLOC_CONF")} == {name: "max_split_size_mb:64"}
