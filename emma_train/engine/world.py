"""The processes of a run: who am I, on which device, and the few host-side collectives that the loop needs."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from emma_train.engine.rank_failure import report_failure
from emma_train.errors import RunError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup
    """gloo group for host-side values, apart from the groups of the training collectives."""
    sp_size: int = 1
    """Ranks in a row that compute the same packs, each its part of their tokens (engine/ulysses.py)."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which of the `readers` this rank is: ranks that compute the same packs are one."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        return self.size // self.sp_size

    def of_packs(self, sums: Sequence[float]) -> list[float]:
        """Sums over ranks of what was counted in packs, each pack once; a part of a pack counts as one."""
        return [float(-(-value // self.sp_size)) for value in sums]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum host values over ranks, in float64. Touches no device."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks. Values are pickled; for what is rare and small."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` gives on the main rank, for every rank; a UserError or RunError is raised on every rank
        alike."""
        box: list[T | UserError | RunError | None] = [None]
        if self.is_main:
            try:
                box = [function()]
            except (UserError, RunError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        if isinstance(box[0], (UserError, RunError)):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.host_group)


@contextmanager
def join(device: str, timeout_s: int, traces: Path | None = None) -> Iterator[World]:
    """Join the processes that torchrun or SLURM started, or be the only one; leave cleanly whatever happens.

    NCCL writes what it was at when it timed out to `traces` with the rank behind it. Raises LostRanks where others are
    gone.
    """
    # Of torch's own making: its deprecated collectives, and views that we never write to in place.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    kind = pick_device(device)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store = None if "RANK" in os.environ else dist.HashStore()
    timeout = timedelta(seconds=timeout_s)
    record_flights(traces)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local, dist.new_group(backend="gloo", timeout=timeout))
    except Exception as error:
        if (lost := report_failure(error, rank, size)) is not None:
            raise lost from error
        raise
    finally:
        dist.destroy_process_group()


def share_packs(world: World, ranks: int) -> World:
    """The same world, with so many ranks to a pack. Raises UserError where they do not divide it."""
    if world.size % ranks:
        raise UserError(f"engine.sequence_parallel is {ranks}, which does not divide {world.size} processes")
    return replace(world, sp_size=ranks)


def record_flights(traces: Path | None) -> None:
    """Have NCCL keep its last collectives and write them out when one times out; what is set already stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if traces is not None:
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, str(traces))


def pick_device(device: str) -> str:
    """cpu or cuda. Raises UserError where cuda is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"engine.device is cuda, but torch sees no CUDA device on {socket.gethostname()}; use engine.device=auto"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
