"""The processes of a run: this rank, its device, and the few host-side collectives that the loop needs."""

import logging
import os
import resource
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
FEWEST_FILES = 64
"""Open files that a rank needs for its group, shards and workers."""


@dataclass(frozen=True)
class World:
    """One process among `size`."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup
    """gloo group for host-side values, separate from the groups of the training collectives."""
    sp_size: int = 1
    """Number of consecutive ranks that share a pack: each computes a part of its tokens (engine/ulysses.py)."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank; the ranks that share a pack have the same."""
        return self.rank // self.sp_size

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.size // self.sp_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum host values over ranks, in float64. Does not use the device."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank. Values are pickled: use it for small, rare ones."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the main rank; every rank returns its value, or raises its UserError or RunError."""
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


@contextmanager
def join(device: str, timeout_s: int, traces: Path | None = None) -> Iterator[World]:
    """Join the process group that torchrun or SLURM started, or one of a single process; leave it at the end.

    When a collective times out, NCCL writes its last collectives to the file `traces` + rank. Raises RankFailure where
    other ranks cannot be reached.
    """
    # Torch warns of its own code: collectives that it deprecates, and views that are never written to in place.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    if (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FEWEST_FILES:
        raise UserError(f"a process may open {limit} files, too few to train; raise it: ulimit -n {FEWEST_FILES}")
    kind = pick_device(device)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        use_expandable_segments()
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store = None if "RANK" in os.environ else dist.HashStore()
    timeout = timedelta(seconds=timeout_s)
    record_flights(traces)
    allow_forks()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local, dist.new_group(backend="gloo", timeout=timeout))
    except Exception as error:
        if (failure := report_failure(error, rank, size)) is not None:
            raise failure from error
        raise
    finally:
        dist.destroy_process_group()


def share_packs(world: World, sp_size: int) -> World:
    """The same world with `sp_size` ranks to a pack. Raises UserError where the number of ranks is no multiple."""
    if world.size % sp_size:
        raise UserError(f"engine.sequence_parallel is {sp_size}, which does not divide {world.size} processes")
    return replace(world, sp_size=sp_size)


def use_expandable_segments() -> None:
    """Let CUDA's allocator extend its segments, before it is used: every pack has another length, and segments of fixed
    sizes would be left with gaps. Settings of the allocator that exist already stay as they are."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def record_flights(traces: Path | None) -> None:
    """Let NCCL keep its last collectives and write them to a file when one times out. Variables that are set already
    stay as they are."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if traces is not None:
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            os.environ.setdefault(name, str(traces))


def allow_forks() -> None:
    """Let loader workers be forked while NCCL has memory registered with InfiniBand or EFA; what is set already stays.

    Every stage of a pipeline forks its workers, and from the second on there are communicators. Without this,
    libibverbs may hand a child's write to the card, and EFA's provider aborts the process that forks (libfabric #6332).
    Workers themselves never touch CUDA (data_pipelines/loader).
    """
    for name in ("RDMAV_FORK_SAFE", "FI_EFA_FORK_SAFE"):
        os.environ.setdefault(name, "1")


def pick_device(device: str) -> str:
    """Resolve auto to cpu or cuda. Raises UserError where `device` is cuda and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"engine.device is cuda, but torch sees no CUDA device on {socket.gethostname()}; use engine.device=auto"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
