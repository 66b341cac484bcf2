"""Which ranks are on which node, and where their files have a copy."""

import pytest

from emma_train.checkpoint.nodes import NODE_VARIABLE, Nodes, this_node


@pytest.mark.parametrize("names", ["ab", "aabb", "aaab", "abbb", "abcabc", "aabbccdd", "abcccb"])
def test_every_rank_has_a_copy_on_the_next_node_and_none_on_its_node(names: str) -> None:
    nodes, order = Nodes(names), list(dict.fromkeys(names))
    for rank, node in enumerate(names):
        keeper = nodes.copy_rank(rank)
        assert keeper is not None
        assert order.index(names[keeper]) == (order.index(node) + 1) % len(order)
    copied = [rank for keeper in range(len(names)) for rank in nodes.copied_ranks(keeper)]
    assert sorted(copied) == list(range(len(names)))
    # The ranks of a node share the work evenly.
    for node in order:
        shares = [len(nodes.copied_ranks(rank)) for rank in nodes.of(node)]
        assert max(shares) - min(shares) <= 1


def test_one_node_keeps_no_copies() -> None:
    nodes = Nodes("aaa")
    assert [nodes.copy_rank(rank) for rank in range(3)] == [None] * 3
    assert [nodes.copied_ranks(rank) for rank in range(3)] == [[], [], []]
    assert [nodes.is_first(rank) for rank in range(3)] == [True, False, False]


def test_the_variable_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "slurm-7")
    assert this_node() == "slurm-7"
    monkeypatch.setenv(NODE_VARIABLE, "seven")
    assert this_node() == "seven"
