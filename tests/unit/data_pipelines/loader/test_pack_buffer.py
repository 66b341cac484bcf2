"""A pack survives the copy into one buffer, and needs one open file per process."""

import os
from typing import Any

import pytest
import torch

from data_pipelines.loader.pack_buffer import PackBuffer
from emma_train.sequence.pack import pack
from tests.helpers import assert_same_pack, i2t_sample, mixed_samples, t2i_sample


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("samples", [mixed_samples(), [i2t_sample()], [t2i_sample()], [i2t_sample(grids=())]], ids=len)
def test_a_pack_comes_back_as_it_was(samples: list[Any], shared: bool) -> None:
    batch = pack(samples, 3)
    pack_buffer = PackBuffer.of(batch, "along", shared)
    assert pack_buffer.buffer.is_shared() == shared
    assert_same_pack(pack_buffer.batch(), batch)
    assert pack_buffer.extra == "along"
    assert all(offset % 64 == 0 for offset, *_ in pack_buffer.tensors)


def test_a_pack_from_another_process_holds_one_open_file() -> None:
    """workers x prefetch packs are read ahead, and a process can often open no more than a thousand files."""
    context = torch.multiprocessing.get_context("fork")
    queue, done = context.Queue(), context.Event()

    def send() -> None:
        for number in range(10):
            queue.put(PackBuffer.of(pack(mixed_samples(number)), number, shared=True))
        done.wait(30)

    process = context.Process(target=send)
    before = len(os.listdir("/proc/self/fd"))
    process.start()
    packs = [queue.get(timeout=30) for _ in range(10)]
    opened = len(os.listdir("/proc/self/fd")) - before
    for number, pack_buffer in enumerate(packs):
        assert pack_buffer.extra == number
        assert_same_pack(pack_buffer.batch(), pack(mixed_samples(number)))
    done.set()
    process.join(30)
    assert process.exitcode == 0
    assert opened <= 10 + 8  # and the queue's own


def test_pinning_moves_the_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch only pins memory if there is an accelerator, so it is replaced here; tests/gpu tests the real one."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.nbytes), tensor.clone())[1])
    batch = pack(mixed_samples())
    pack_buffer = PackBuffer.of(batch)
    assert_same_pack(pack_buffer.pin_memory().batch(), batch)
    assert pinned == [pack_buffer.buffer.nbytes]
