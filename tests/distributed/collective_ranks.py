"""What ranks do in the tests of collectives and of heartbeats. Here, and not in a test module, because a rank finds its
function by name."""

import ctypes
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emma_train.config.schema import Recipe
from emma_train.engine.heartbeat import Heartbeat
from emma_train.engine.stall_watch import StallWatch
from emma_train.engine.timeouts import Timeouts
from emma_train.engine.world import join
from emma_train.stages.stage import stage_of
from emma_train.training.build import build, set_initial
from tests.distributed.failing import shorten_waits
from tests.distributed.ranks import make_pack, step_of


def reductions(recipe: Recipe, kinds: list[str]) -> tuple[int, list[tuple[int, int]], float]:
    """FSDP's units with weights that train; by micro-step of one optimizer step the reduce-scatters and the all-reduces
    of its backward pass; and the gradient norm. Every rank computes one pack of each kind."""
    calls: list[str] = []

    def counted(name: str) -> None:
        plain = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return plain(*args, **options)

        setattr(dist, name, call)

    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=True)
        set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
        built.engine.sync_compute_weights()
        # Before torch 2.13 FSDP calls the former.
        scatters = [name for name in ("reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, name)]
        for name in (*scatters, "all_reduce"):
            counted(name)
        accumulate, counts = built.engine.accumulate, []

        def accumulate_counted(loss: Tensor, last: bool) -> None:
            calls.clear()
            accumulate(loss, last)
            counts.append((sum(map(calls.count, scatters)), calls.count("all_reduce")))

        built.engine.accumulate = accumulate_counted  # type: ignore[method-assign]
        norm = step_of(recipe, world, built, [make_pack(recipe, kind) for kind in kinds])["norm"]
        return len(built.engine._trained), counts, norm  # type: ignore[attr-defined]


def wait_forever(victim: int, how: str) -> None:
    """Ranks whose main thread waits in a system call that never returns; one of them dies, is stopped, fails or leaves
    in time, and so does the last one after a while."""
    logging.basicConfig(format="%(message)s", force=True)
    with join("cpu", 60) as world:
        with Heartbeat(world, silent_s=9, beat_s=0.5, grace_s=3):
            time.sleep(2)
            if world.rank == victim:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if how == "failed":
                    raise ValueError("a bad day")
            if how == "left" and world.rank != victim:
                time.sleep(14)
            if how != "left":
                ctypes.CDLL(None).pause()
        if how == "left":
            world.sum([0.0])


def stall(victim: int, how: str, logs: Path) -> None:
    """Ranks that sum; the victim comes late, is stopped or is at a line of its own for good."""
    logging.basicConfig(format="%(message)s", force=True)
    shorten_waits()
    with join("cpu", 9) as world, StallWatch(world, logs, poll_s=0.2, answer_s=3) as watch:
        world.sum([0.0])
        watch.done = 7
        watch.expect(2.5)
        if world.rank == victim:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "busy":
                time.sleep(6)
            if how == "late":
                time.sleep(1)
        world.sum([1.0])
        watch.expect(2.5)
        time.sleep(1)  # no second report


def timeouts_in_turn() -> list[float]:
    """Timeouts of both groups in seconds: at first, after a step, inside `relaxed`, after it, and at the end."""
    with join("cpu", 50) as world:
        seconds: list[float] = []

        def note() -> None:
            group = dist.distributed_c10d._get_default_group()
            for each in (group, world.host_group):
                seconds.append(each._get_backend(torch.device("cpu")).options._timeout.total_seconds())

        timeouts = Timeouts(world, [], long_s=50, step_s=5, watch=StallWatch(world, Path("unused")))
        note()
        timeouts.use_step_timeout(1)
        note()
        with timeouts.relaxed():
            note()
        note()
        timeouts.restore()
        note()
        return seconds
