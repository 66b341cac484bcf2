"""The peak of memory belongs to the interval since the last call."""

import torch

from emma_train.monitor.usage import memory_gib

CPU = torch.device("cpu")


def test_the_peak_is_of_the_interval_alone() -> None:
    before = memory_gib(CPU)
    block = torch.ones(2**26)  # 0.25 GiB
    del block
    with_block = memory_gib(CPU)
    after = memory_gib(CPU)
    assert with_block > after + 0.2
    assert after <= before + 0.05
