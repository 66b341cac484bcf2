"""Runs of flattened values as boxes, and stored as what a whole tensor is stored as."""

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
def test_boxes_are_the_run_in_its_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    whole = torch.arange(prod(shape)).view(shape)
    found = as_rectangles(shape, start, stop)
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in found]
    assert torch.equal(torch.cat([*parts, whole.flatten()[:0]]), whole.flatten()[start:stop])
    assert len(found) <= 2 * len(shape) - 1


@given(runs())
def test_pieces_write_through_to_the_run(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    whole = torch.randn(shape)
    fragment = FlatShard(torch.zeros(stop - start), start, whole.shape)
    for place, own in local_chunks(fragment):
        own.copy_(whole[place])
    assert torch.equal(local(fragment), whole.flatten()[start:stop])


def cut(whole: torch.Tensor, ends: list[int]) -> list[FlatShard]:
    """The same tensor as several ranks hold it."""
    values = whole.flatten()
    return [
        FlatShard(values[a:b].clone(), a, whole.shape) for a, b in zip([0, *ends], [*ends, len(values)], strict=True)
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 4, 2), (2, 3, 3, 2)])
def test_a_fragment_loads_its_run_of_a_tensor_that_was_saved_whole(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape)
    save(tmp_path / "whole", {"x": whole})
    for fragment in cut(torch.zeros(shape), [2, whole.numel() - 3]):
        dcp.load({"x": fragment}, checkpoint_id=tmp_path / "whole", no_dist=True)
        end = fragment.start + len(local(fragment))
        assert torch.equal(local(fragment), whole.flatten()[fragment.start : end])


@pytest.mark.filterwarnings("ignore")
def test_a_fragment_that_is_all_of_a_tensor_is_saved_as_the_tensor(tmp_path: Path) -> None:
    whole = torch.randn(5, 3)
    save(tmp_path / "run", {"x": FlatShard(whole.flatten(), 0, whole.shape)})
    read = torch.zeros(5, 3)
    dcp.load({"x": read}, checkpoint_id=tmp_path / "run", no_dist=True)
    assert torch.equal(read, whole)


def test_copies_stay_fragments_and_nothing_else_is_computed_with_them() -> None:
    fragment = FlatShard(torch.arange(4.0), 2, torch.Size([3, 3]))
    copied = fragment.clone()
    local(copied)[0] = 9.0
    assert isinstance(copied, FlatShard)
    assert (copied.start, copied.shape, local(fragment)[0], local(copied)[0]) == (2, (3, 3), 0.0, 9.0)
    assert local(fragment.to(torch.float64)).dtype == torch.float64
    with pytest.raises(NotImplementedError, match="needs more of a tensor than this rank's run of it"):
        fragment + 1
