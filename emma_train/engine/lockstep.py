"""Debugging of lock-step (contract 3): before a module runs, all ranks say which one it is.

Where they differ, every rank stops at once and the error names ranks and modules, before a collective of the one meets
that of another and all wait. It costs a message for every module.
"""

from collections.abc import Callable
from datetime import timedelta
from hashlib import blake2b
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emma_train.engine.protocol import Engine
from emma_train.engine.world import World


class OutOfStep(RuntimeError):
    """Ranks run different modules."""


class LockStep:
    """The meeting point of all ranks."""

    def __init__(self, world: World, timeout_s: int) -> None:
        self._world, self._before = world, "the start"
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def meet(self, what: str) -> None:
        """Go on when all ranks are at `what`. Raises OutOfStep, naming where each is."""
        mine = int.from_bytes(blake2b(what.encode(), digest_size=8).digest(), signed=True)
        all_of_them = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world.size)]
        dist.all_gather(all_of_them, torch.tensor([mine]), group=self._group)
        if any(int(other) != mine for other in all_of_them):
            places: list[Any] = [None] * self._world.size
            dist.all_gather_object(places, what, group=self._group)
            raise OutOfStep(f"ranks are out of step after {self._before}: {describe(places)}")
        self._before = what


class WatchedEngine:
    """An engine whose ranks meet before every module, backward pass and optimizer step."""

    def __init__(self, engine: Engine, lock_step: LockStep) -> None:
        self._engine, self._lock_step = engine, lock_step
        for name, module in engine.model.named_modules():
            if name:
                # First of all hooks: before FSDP or ZeRO gather.
                module.register_forward_pre_hook(_meeting(lock_step, name), prepend=True)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        self._lock_step.meet("the backward pass" + " that is the last of the step" * last)
        self._engine.accumulate(loss, last)

    def step(self, lr: float) -> float:
        self._lock_step.meet("the optimizer step")
        return self._engine.step(lr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def watched(engine: Engine, world: World, timeout_s: int) -> Engine:
    """The engine, with its ranks kept in step."""
    return cast(Engine, WatchedEngine(engine, LockStep(world, timeout_s)))


def describe(places: list[str]) -> str:
    """The places and who is there, the fewest first."""
    ranks: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return ", ".join(
        f"rank{'s' if who[1:] else ''} {' '.join(map(str, who))} at {place}"
        for place, who in sorted(ranks.items(), key=lambda item: len(item[1]))
    )


def _meeting(lock_step: LockStep, name: str) -> Callable[[nn.Module, Any], None]:
    return lambda module, inputs: lock_step.meet(name)
