"""A replay finds hardware that computes wrongly without an error: one micro-step, twice, must give the same bits."""

import socket
from collections.abc import Callable

from torch import Tensor

from emma_train.engine.protocol import Engine
from emma_train.engine.world import World
from emma_train.metrics import not_recording


def find_mismatches(engine: Engine, world: World, compute_loss: Callable[[], Tensor]) -> list[str]:
    """A line for each rank whose loss or gradients differ between two runs of `compute_loss` and its backward pass.

    Every rank calls it and gets the same lines. Gradients are compared before they are summed over ranks, so the rank
    that is named is the one that computed wrongly. Changes nothing."""
    with not_recording():
        first, second = (engine.gradient_checksums(compute_loss) for _ in range(2))
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    more = f" and {len(names) - 1} more" if names[1:] else ""
    line = (
        f"rank {world.rank} on {socket.gethostname()} computed {names[0]}{more} twice, to other bits" if names else ""
    )
    return [text for text in world.gather(line) if text]
