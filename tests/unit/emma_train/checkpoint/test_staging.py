"""Host copies of a rank's tensors: their values, and the memory that they take."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from emma_train.checkpoint import staging
from emma_train.checkpoint.staging import Staging, allocate, group
from emma_train.config.schema import ModelConfig
from emma_train.model.emma import Emma

CPU = torch.device("cpu")


def test_a_copy_keeps_its_values_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LARGEST", 2048)
    live = {
        "large": torch.arange(1000, dtype=torch.float32).view(10, 100),
        "half": torch.arange(300, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    want = {name: tensor.clone() for name, tensor in live.items()}
    copies = Staging(CPU)
    first = copies.copy(live)
    for tensor in live.values():
        tensor.zero_()
    for name, tensor in want.items():
        assert torch.equal(first[name], tensor) and first[name].dtype == tensor.dtype
    second = copies.copy(live)
    assert all(second[name].data_ptr() == first[name].data_ptr() for name in live), "buffers are used again"
    assert not second["large"].any()
    assert copies.copy({"large": torch.ones(3)})["large"].tolist() == [1, 1, 1]  # another layout


def test_each_copy_has_a_storage_of_its_own_at_an_aligned_place() -> None:
    """torch.distributed.checkpoint copies tensors that are part of a larger storage before it writes them."""
    parts = {f"w{n}": torch.zeros(n, dtype=torch.float32) for n in range(1, 40)}
    buffers = allocate(parts, pinned=False)
    assert all(b.untyped_storage().size() == b.nbytes == parts[name].nbytes for name, b in buffers.items())
    places = sorted((b.data_ptr(), b.nbytes) for b in buffers.values())
    assert all(start + size <= after for (start, size), (after, _) in zip(places, places[1:], strict=False))
    assert len({start % staging.ALIGNMENT for start, _ in places}) == 1


@pytest.mark.parametrize("shards", [8, 64])
def test_pinned_memory_of_the_full_model_is_hardly_larger_than_its_tensors(shards: int) -> None:
    """Weights, two moments and averages of EMMA-4B on one of the ranks: torch rounds each allocation up to a power of
    two."""
    with torch.device("meta"):
        model = Emma(ModelConfig())
    sizes = {
        f"{name}.{kind}": -(-4 * p.numel() // shards // staging.ALIGNMENT) * staging.ALIGNMENT
        for name, p in model.named_parameters()
        for kind in ("weight", "exp_avg", "exp_avg_sq", "average")
    }
    groups = group(sizes)
    assert sorted(name for names in groups for name in names) == sorted(sizes)
    totals = [sum(sizes[name] for name in names) for names in groups]
    assert max(totals) <= staging.LARGEST
    exact, alone = sum(sizes.values()), sum(_allocated(size) for size in sizes.values())
    assert alone / exact > 1.3
    assert sum(_allocated(total) for total in totals) / exact < 1.07


def _allocated(size: int) -> int:
    return 1 << (size - 1).bit_length()


def test_the_saving_thread_leaves_the_first_card_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.stream returns at its end to the device of the thread, which in a new thread is card 0."""
    calls: list[str] = []

    @contextmanager
    def stream(stream: object) -> Iterator[None]:
        calls.append(f"stream {stream}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))
    with Staging(torch.device("cuda", 3)).side_stream():
        pass
    assert calls == ["set cuda:3", "stream of cuda:3"]
    with Staging(CPU).side_stream():
        pass
    assert calls[2:] == ["stream None"]
