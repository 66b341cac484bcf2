"""Which nodes of an elastic job train, and when another round begins."""

import pytest

from emma_train.config.load import load_stages
from emma_train.preflight import node_counts
from launchers.elastic import nodes_that_train, num_gone
from tests.helpers import ROOT

TINY = ROOT / "recipes" / "tiny"


@pytest.mark.parametrize(
    ("num_nodes", "counts", "training"),
    [(3, (2, 3), 3), (2, (2, 3), 2), (5, (2, 3, 6), 3), (34, (16, 32), 32), (31, (16, 32), 16), (1, (2, 3), 0)],
)
def test_the_largest_number_that_shares_the_packs_trains(
    num_nodes: int, counts: tuple[int, ...], training: int
) -> None:
    assert nodes_that_train(num_nodes, counts) == training


@pytest.mark.parametrize(
    ("live", "has_left", "gone"),
    [
        ({0, 1, 2, 3}, False, 0),
        ({0, 1, 2}, False, 0),  # rank 3 was a spare
        ({0, 2, 3}, False, 1),
        ({3}, False, 3),
        ({0, 1, 2, 3}, True, 1),  # one ended its processes, and is ready for the next round
    ],
)
def test_a_round_ends_where_a_node_that_trains_is_gone(live: set[int], has_left: bool, gone: int) -> None:
    assert num_gone(live, 3, has_left) == gone


@pytest.mark.seconds
def test_numbers_of_nodes_follow_from_the_slots() -> None:
    """data.slots is 6 in the tiny recipes."""
    stages = load_stages(TINY / "stage1.yaml", [])
    assert node_counts(stages, range(1, 13), 1) == [1, 2, 3, 6]
    assert node_counts(stages, range(2, 8), 2) == [3]
    assert node_counts(stages, range(1, 9), 4) == []
    shared = load_stages(TINY / "stage1.yaml", ["engine.sequence_parallel=2"])
    assert node_counts(shared, range(1, 13), 1) == [2, 4, 6, 12]
