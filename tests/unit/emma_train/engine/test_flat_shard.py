"""Runs of flattened values as rectangles, and stored as what a full tensor is stored as."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from emma_train.engine.flat_shard import FlatShard, as_rectangles, local, local_chunks


@st.composite
def runs(draw: Any) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    ends = sorted((draw(st.integers(0, prod(shape))), draw(st.integers(0, prod(shape)))))
    return shape, ends[0], ends[1]


@given(runs())
def test_rectangles_are_the_run_in_its_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    full = torch.arange(prod(shape)).view(shape)
    rectangles = as_rectangles(shape, start, stop)
    slices = [tuple(slice(o, o + n) for o, n in zip(*rectangle, strict=True)) for rectangle in rectangles]
    parts = [full[rectangle].flatten() for rectangle in slices]
    assert torch.equal(torch.cat([*parts, full.flatten()[:0]]), full.flatten()[start:stop])
    assert len(rectangles) <= 2 * len(shape) - 1


@given(runs())
def test_pieces_write_through_to_the_run(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    full = torch.randn(shape)
    shard = FlatShard(torch.zeros(stop - start), start, full.shape)
    for slices, chunk in local_chunks(shard):
        chunk.copy_(full[slices])
    assert torch.equal(local(shard), full.flatten()[start:stop])


def cut(full: torch.Tensor, ends: list[int]) -> list[FlatShard]:
    """The same tensor as several ranks hold it."""
    values = full.flatten()
    return [
        FlatShard(values[a:b].clone(), a, full.shape) for a, b in zip([0, *ends], [*ends, len(values)], strict=True)
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 2), (2, 3, 3, 2)])
def test_a_flat_shard_loads_its_run_of_a_tensor_that_was_saved_in_full(tmp_path: Path, shape: tuple[int, ...]) -> None:
    full = torch.randn(shape)
    save(tmp_path / "whole", {"x": full})
    for shard in cut(torch.zeros(shape), [2, full.numel() - 3]):
        dcp.load({"x": shard}, checkpoint_id=tmp_path / "whole", no_dist=True)
        end = shard.start + len(local(shard))
        assert torch.equal(local(shard), full.flatten()[shard.start : end])


@pytest.mark.filterwarnings("ignore")
def test_a_flat_shard_that_is_all_of_a_tensor_is_saved_as_the_tensor(tmp_path: Path) -> None:
    full = torch.randn(5, 3)
    save(tmp_path / "run", {"x": FlatShard(full.flatten(), 0, full.shape)})
    read = torch.zeros(5, 3)
    dcp.load({"x": read}, checkpoint_id=tmp_path / "run", no_dist=True)
    assert torch.equal(read, full)


def test_copies_stay_flat_shards_and_nothing_else_is_computed_with_them() -> None:
    shard = FlatShard(torch.arange(4.0), 2, torch.Size([3, 3]))
    copied = shard.clone()
    local(copied)[0] = 9.0
    assert isinstance(copied, FlatShard)
    assert (copied.start, copied.shape, local(shard)[0], local(copied)[0]) == (2, (3, 3), 0.0, 9.0)
    assert local(shard.to(torch.float64)).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="needs values of a FlatShard that other ranks have"):
        shard + 1
