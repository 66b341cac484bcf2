"""Debugging of lock-step (contract 3): before a module runs, all ranks compare which one it is.

If they differ, every rank stops at once with an error that names ranks and modules. Without this, collectives of
different modules would meet and all ranks would hang. It costs one collective per module call.
"""

from collections.abc import Callable
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emma_train.engine.protocol import Engine
from emma_train.engine.world import World


class OutOfStep(RuntimeError):
    """Ranks run different modules."""


class LockStep:
    """Compares what all ranks are about to run."""

    def __init__(self, world: World, timeout_s: int) -> None:
        self._world = world
        self._previous = "the start"
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def check(self, name: str) -> None:
        """Return when all ranks are about to run `name`. Raises OutOfStep on all of them if one is not."""
        digest = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), signed=True)
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world.size)]
        dist.all_gather(digests, torch.tensor([digest]), group=self._group)
        if any(int(other) != digest for other in digests):
            names: list[Any] = [None] * self._world.size
            dist.all_gather_object(names, name, group=self._group)
            raise OutOfStep(f"ranks are out of step after {self._previous}: {describe_names(names)}")
        self._previous = name


class WatchedEngine:
    """An engine whose ranks are compared before every module, backward pass and optimizer step."""

    def __init__(self, engine: Engine, lock_step: LockStep) -> None:
        self.model = engine.model
        self.groups = engine.groups
        self.weights = engine.weights
        self._engine = engine
        self._lock_step = lock_step
        for name, module in engine.model.named_modules():
            if name:
                # Before all other hooks: those of FSDP and ZeRO gather weights.
                module.register_forward_pre_hook(_check_hook(lock_step, name), prepend=True)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        self._lock_step.check("the backward pass" + " that is the last of the step" * last)
        self._engine.accumulate(loss, last)

    def step(self, lr: float) -> float:
        self._lock_step.check("the optimizer step")
        return self._engine.step(lr)

    def gradient_checksums(self, compute_loss: Callable[[], Tensor]) -> dict[str, int]:
        return self._engine.gradient_checksums(compute_loss)

    def sync_compute_weights(self) -> None:
        self._engine.sync_compute_weights()

    def reshard(self) -> None:
        self._engine.reshard()

    def state(self) -> dict[str, dict[str, Any]]:
        return self._engine.state()

    def close(self) -> None:
        self._engine.close()


def watched(engine: Engine, world: World, timeout_s: int) -> Engine:
    """The engine, with its ranks compared all the time."""
    return WatchedEngine(engine, LockStep(world, timeout_s))


def describe_names(names: list[str]) -> str:
    """Each name with the ranks that are about to run it, fewest ranks first."""
    ranks_by_name: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        ranks_by_name.setdefault(name, []).append(rank)
    return ", ".join(
        f"rank{'s' if ranks[1:] else ''} {' '.join(map(str, ranks))} at {name}"
        for name, ranks in sorted(ranks_by_name.items(), key=lambda item: len(item[1]))
    )


def _check_hook(lock_step: LockStep, name: str) -> Callable[[nn.Module, Any], None]:
    return lambda module, inputs: lock_step.check(name)
