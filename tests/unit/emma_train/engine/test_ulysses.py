"""How the rows of a pack are divided among ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emma_train.engine.ulysses import divide
from emma_train.engine.world import World, share_packs
from emma_train.errors import UserError


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 6))
def test_every_row_has_one_rank_and_branches_stay_in_order(num_und: int, num_gen: int, parts: int) -> None:
    rows = divide(num_und, num_und + num_gen, parts, torch.device("cpu"))
    assert sorted(torch.cat(rows.of_rank).tolist()) == list(range(num_und + num_gen))
    for rank_rows, num_rank_und in zip(rows.of_rank, rows.num_und, strict=True):
        assert rank_rows.tolist() == sorted(rank_rows.tolist())
        assert sum(row < num_und for row in rank_rows.tolist()) == num_rank_und
    for counts in (rows.num_und, [n - u for n, u in zip(rows.sizes, rows.num_und, strict=True)]):
        assert max(counts) - min(counts) <= 1


def test_ranks_that_share_a_pack_read_the_same() -> None:
    worlds = [share_packs(World(rank, 6, torch.device("cpu"), None), 2) for rank in range(6)]  # type: ignore[arg-type]
    assert [(w.dp_rank, w.dp_size) for w in worlds] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
    with pytest.raises(UserError, match="engine.sequence_parallel is 4, which does not divide 6 processes"):
        share_packs(worlds[0], 4)
