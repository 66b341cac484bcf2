"""The nodes of a run: which ranks are on which, and on which other node the files of a rank have a copy."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

NODE_VARIABLE = "EMMA_NODE"
"""Environment variable that names a node where its host name does not, as in a test with several nodes on one host."""


def this_node() -> str:
    """The name of this process's node."""
    return os.environ.get(NODE_VARIABLE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Nodes:
    """The node of every rank."""

    names: Sequence[str]

    def of(self, node: str) -> list[int]:
        """The ranks on a node."""
        return [rank for rank, name in enumerate(self.names) if name == node]

    def is_first(self, rank: int) -> bool:
        """Whether the rank is the first one of its node: it makes and removes the node's folders."""
        return self.of(self.names[rank])[0] == rank

    def copy_rank(self, rank: int) -> int | None:
        """The rank on the next node that keeps a copy of this rank's files; None where there is one node only."""
        order = list(dict.fromkeys(self.names))
        if len(order) == 1:
            return None
        node = self.names[rank]
        keepers = self.of(order[(order.index(node) + 1) % len(order)])
        return keepers[self.of(node).index(rank) % len(keepers)]

    def copied_ranks(self, rank: int) -> list[int]:
        """The ranks whose files this rank keeps a copy of."""
        return [other for other in range(len(self.names)) if self.copy_rank(other) == rank]
