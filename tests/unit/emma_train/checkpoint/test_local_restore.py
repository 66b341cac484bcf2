"""Which local checkpoint a restart takes, from what the nodes have of them."""

from itertools import combinations
from typing import Any

import pytest

from emma_train.checkpoint.local_folder import is_continued
from emma_train.checkpoint.local_restore import LocalPart, assign_ranks, local_checkpoints
from emma_train.checkpoint.nodes import Nodes

FILES = ("weights/__0_0.distcp", "weights/__1_0.distcp", "weights/__2_0.distcp", "weights/__3_0.distcp")


def part(node: str, step: int, ranks: str, checksum: str = "same") -> LocalPart:
    """What a node has of a checkpoint of four ranks."""
    return LocalPart(node, step, checksum, frozenset(FILES), frozenset(FILES[int(rank)] for rank in ranks))


def steps(parts: list[LocalPart], newer_than: int = -1) -> list[int]:
    return [checkpoint.step for checkpoint in local_checkpoints(parts, newer_than)[0]]


def test_any_one_node_may_be_lost_and_of_four_no_two_neighbours() -> None:
    """Node n has the files of rank n and those of the rank before it."""
    parts = [part(node, 8, f"{rank}{(rank - 1) % 4}") for rank, node in enumerate("abcd")]
    assert steps(parts) == [8]
    for lost in range(4):
        assert steps([p for p in parts if p is not parts[lost]]) == [8]
    for pair in combinations(range(4), 2):
        are_neighbours = abs(pair[0] - pair[1]) in (1, 3)
        assert steps([p for i, p in enumerate(parts) if i not in pair]) == ([] if are_neighbours else [8]), pair


def test_the_newest_complete_one_comes_first_and_others_say_what_is_missing() -> None:
    parts = [part("a", 6, "01"), part("b", 6, "23"), part("a", 4, "0123"), part("a", 8, "01"), part("b", 8, "2")]
    complete, problems = local_checkpoints(parts, 0)
    assert [checkpoint.step for checkpoint in complete] == [6, 4]
    assert problems == [f"step 8: no node has {FILES[3]}"]
    assert complete[0].nodes == {FILES[0]: ("a",), FILES[1]: ("a",), FILES[2]: ("b",), FILES[3]: ("b",)}


def test_those_that_shared_storage_has_overtaken_do_not_count() -> None:
    parts = [part("a", 6, "0123"), part("a", 4, "0")]
    assert steps(parts, newer_than=5) == [6]
    assert local_checkpoints(parts, newer_than=6) == ([], [])


def test_parts_of_two_starts_are_never_mixed() -> None:
    parts = [part("a", 6, "01", "one"), part("b", 6, "23", "other")]
    assert steps(parts) == []
    assert steps([*parts, part("c", 6, "23", "one")]) == [6]


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ({"start": "now", "after": 4}, True),
        ({"start": "now", "after": None}, True),  # before the first shared checkpoint
        ({"start": "now", "after": 8}, False),  # a person moved that of step 8 away
        ({"start": "before", "after": 4}, False),
        ({}, False),
    ],
)
def test_a_local_checkpoint_counts_only_on_the_way_of_the_run(local: dict[str, Any], expected: bool) -> None:
    assert is_continued({"local": local}, "now", [2, 4]) is expected


@pytest.mark.parametrize("names", ["aabb", "abab", "ab", "aaab"])
def test_files_are_copied_by_ranks_of_a_node_that_has_them_in_turn(names: str) -> None:
    having = {f"{number}": ("a", "b") if number % 3 else ("b",) for number in range(12)}
    nodes = Nodes(names)
    assigned = assign_ranks(having, nodes)
    assert assigned.keys() == having.keys()
    for file, rank in assigned.items():
        assert names[rank] == having[file][0]
    for node in "ab":
        shares = [list(assigned.values()).count(rank) for rank in nodes.of(node)]
        assert max(shares) - min(shares) <= 1
