"""Functions that ranks run in tests of failures; a rank imports them by name, so they are in no test module."""

import contextlib
import ctypes
import errno
import math
import os
import resource
import signal
import subprocess
import time
from collections.abc import Generator, Iterable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from data_pipelines import cli as data_cli
from data_pipelines.loader import loader
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.sample_builder import SampleBuilder
from emma_train.cli import main
from emma_train.engine import heartbeat, rank_failure
from emma_train.engine.fsdp import FsdpEngine
from emma_train.objectives import flow
from emma_train.objectives.loss import LossAccumulator
from emma_train.sequence.step_batches import StepBatches
from emma_train.storage.local_storage import LocalStorage
from emma_train.training import health
from emma_train.training.loop import Trainer

ERRORS = {
    "bug": TypeError("unforeseen"),
    "files": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "memory": MemoryError(),
}


def failing_command(argv: list[str], where: str, kind: str) -> int:
    """A command on whose last rank an error is raised: in the `worker` that reads, in the `trainer` that receives packs
    or in the `builder` of samples."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        if where == "worker":
            SampleReader.read = _raise(kind)  # type: ignore[method-assign]
        elif where == "builder":
            SampleBuilder.sample = _raise(kind)  # type: ignore[method-assign]
        else:
            receive = loader._unpack_results

            def failing(results: Iterable[Any]) -> Generator[loader.LoadedSlot]:
                for number, slot in enumerate(receive(results)):
                    if number == 4:
                        raise ERRORS[kind]
                    yield slot

            loader._unpack_results = failing
    return main(argv)


def _raise(kind: str) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise ERRORS[kind]

    return fail


def shorten_waits() -> None:
    """Ranks that lost the others look for their errors, and then may end by themselves, for seconds only."""

    class QuickHeartbeat(heartbeat.Heartbeat):
        __init__ = partialmethod(heartbeat.Heartbeat.__init__, grace_s=6.0)  # type: ignore[assignment]

    rank_failure.PATIENCE_S, rank_failure.STORE_S = 2.0, 6.0
    heartbeat.Heartbeat = QuickHeartbeat  # type: ignore[misc]


def hanging_command(argv: list[str], victim: int, how: str, number: int) -> int:
    """A command on whose rank `victim` the first loader worker is stopped at its read `number`, or never ends it."""
    shorten_waits()
    if int(os.environ.get("RANK", 0)) == victim:
        read, num_reads = SampleReader.read, 0

        def hang(self: SampleReader, *arguments: Any) -> Any:
            nonlocal num_reads
            num_reads += (worker := get_worker_info()) is None or worker.id == 0
            if num_reads == number and how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if num_reads == number:
                time.sleep(60)
            return read(self, *arguments)

        SampleReader.read = hang  # type: ignore[method-assign]
    return main(argv)


def diverging_command(argv: list[str], after: int) -> int:
    """A command whose gradient is not finite from step `after` + 1 on."""
    step, num_steps = FsdpEngine.step, 0

    def diverging(self: FsdpEngine, lr: float) -> float:
        nonlocal num_steps
        num_steps += 1
        return step(self, lr) if num_steps <= after else math.nan

    FsdpEngine.step = diverging  # type: ignore[method-assign]
    return main(argv)


def other_noise_command(argv: list[str]) -> int:
    """A command whose last rank draws its noise from torch's generator."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        drawn = flow.draw_noise
        flow.draw_noise = lambda batch, channels: torch.randn_like(drawn(batch, channels))
    return main(argv)


def spiking_command(argv: list[str], steps: list[int]) -> int:
    """A command in whose `steps` every loss is 30 times as large; spikes are looked for from the sixth loss on."""
    take, add, factor = Trainer._step, LossAccumulator.add, 1.0

    def spiking_step(self: Trainer, data: StepBatches, *rest: Any) -> Any:
        nonlocal factor
        factor = 30.0 if data.step in steps else 1.0
        return take(self, data, *rest)

    def spiking_add(self: LossAccumulator, text: torch.Tensor, text_task: Any, flow: torch.Tensor, task: Any) -> Any:
        return add(self, text * factor, text_task, flow * factor, task)

    health.MIN_HISTORY = 5
    Trainer._step = spiking_step  # type: ignore[method-assign]
    LossAccumulator.add = spiking_add  # type: ignore[method-assign]
    return main(argv)


def flipping_command(argv: list[str], victim: int, calls: list[int]) -> int:
    """A command on whose rank `victim` one bit of a gradient flips, in some `calls` of the backward passes of replays:
    0 and 1 are those of the first replay."""
    checksums, number = FsdpEngine.gradient_checksums, -1

    def flipping(self: FsdpEngine, compute_loss: Any) -> Any:
        nonlocal number
        number += 1
        if number not in calls or int(os.environ.get("RANK", 0)) != victim:
            return checksums(self, compute_loss)
        with flipped_gradient(self):
            return checksums(self, compute_loss)

    FsdpEngine.gradient_checksums = flipping  # type: ignore[method-assign]
    return main(argv)


@contextlib.contextmanager
def flipped_gradient(engine: FsdpEngine) -> Iterator[None]:
    """Within it, one bit of the gradient of a layer's output flips on this rank."""

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        flipped = gradient.clone()
        flipped.view(torch.int32).view(-1)[0] ^= 1 << 22
        return flipped

    layer = engine.model.decoder.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: output.register_hook(flip) and None)
    try:
        yield
    finally:
        hook.remove()


def unreadable_command(argv: list[str], name: str, number: int) -> int:
    """A command whose last rank cannot read files whose path ends with `name`: the system answers `number`."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        for method in ("read", "open", "size"):
            setattr(LocalStorage, method, _failing_for(getattr(LocalStorage, method), name, number))
    return main(argv)


def _failing_for(method: Any, name: str, number: int) -> Any:
    def fail(self: LocalStorage, file: Any) -> Any:
        if str(file).endswith(name):
            raise OSError(number, os.strerror(number), str(file))
        return method(self, file)

    return fail


def starved_worker_command(argv: list[str], num_bytes: int) -> int:
    """A command on whose last rank loader workers may get so many bytes of memory and no more."""
    start = loader._start_worker

    def starved(number: int, **parts: Any) -> None:
        start(number, **parts)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))

    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        loader._start_worker = starved
    return main(argv)


def small_disk_command(argv: list[str], folder: str, size: str, before: str, module: str = "emma_train") -> int:
    """A command that sees a tmpfs of so many bytes over `folder`, as no other process does. `before`: words of `sh -c`
    that run first. Raises OSError where a process may not mount."""
    new_mounts = 0x20000  # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        raise OSError(ctypes.get_errno(), "unshare")
    for options in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]):
        subprocess.run(["mount", *options], check=True)
    subprocess.run(["sh", "-c", before], check=True)
    return (main if module == "emma_train" else data_cli.main)(argv)
