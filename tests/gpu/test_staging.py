"""Staging on a GPU copies the values of the finished step, although the host is far ahead of the device."""

import threading

import pytest
import torch

from emma_train.checkpoint.staging import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_copy_has_the_values_of_the_step_and_no_later_ones() -> None:
    device = torch.device("cuda", 0)
    staging, slow = Staging(device), torch.randn(4096, 4096, device=device)
    weights = {f"w{n}": torch.zeros(1_000_003, device=device) for n in range(20)}
    for step in (1.0, 2.0, 3.0):
        for _ in range(50):
            slow = slow @ slow / 4096  # keeps the device busy, so that the update is not done when staging begins
        for weight in weights.values():
            weight.fill_(step)
        staging.wait_for_compute()
        staged: dict[str, torch.Tensor] = {}

        def copy(into: dict[str, torch.Tensor] = staged) -> None:
            with staging.side_stream():
                into.update(staging.copy(weights))

        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
        for weight in weights.values():
            weight.fill_(-1.0)
        torch.cuda.synchronize()
        assert all(bool((value == step).all()) for value in staged.values())
        assert all(value.is_pinned() and value.device.type == "cpu" for value in staged.values())
