"""One checkpoint written by all ranks together: shards, then checksums, then the commit that makes it one."""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from emma_train.checkpoint import dcp as store
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.checkpoint.retention import prune
from emma_train.checkpoint.state import State, part
from emma_train.config.schema import TrainConfig
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.storage import paths as places
from emma_train.storage.paths import StoragePath

log = logging.getLogger(__name__)
T = TypeVar("T")
VISIBLE_S = 90.0
"""How long a file that another node has written may take to be seen by the main rank; network file systems cache."""


class Writer:
    """Writes checkpoints into one folder. A rank that fails makes the write fail on every rank."""

    def __init__(self, checkpoints: StoragePath, config: TrainConfig, world: World, timeout_s: float) -> None:
        self._checkpoints, self._config, self._world, self._timeout_s = checkpoints, config, world, timeout_s
        self._frozen: str | None = None
        self._failures = -1
        self.renew()

    def renew(self) -> None:
        """After a failure, forget what ranks may not have in common: a group in which a collective has timed out cannot
        be used again, nor can a plan that not all of them got."""
        # Collectives of a save run beside those of training, so they must not share a group with them.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        self._failures += 1

    def resume_from(self, checkpoint: StoragePath, state: State) -> None:
        """After a resume: what is frozen lies there already, unless the recipe freezes something else by now."""
        frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
        if frozen is not None and frozen.parent == self._checkpoints / folders.FROZEN:
            self._frozen = frozen.name if store.names(frozen) == state.frozen.keys() else None

    def write(self, state: State, values: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
        """Write, check, commit and prune: the layout of `state`, this rank's `values` by name. Returns the new bytes.
        Raises OSError, RunError or CheckpointException."""
        name = folders.step_name(int(meta["step"]))
        folder = folders.unfinished(self._checkpoints, name)
        try:
            self._main(lambda: folders.begin(self._checkpoints, name))
            size = 0 if self._has_frozen(state) else self._write_frozen(state.frozen)
            for part, tensors in state.parts.items():
                store.write(folder / part, tensors, values, self._group, key=f"{part}-{self._failures}")
            files = self._files(folder, list(state.parts))
            self._main(lambda: folders.commit(folder, {**meta, "frozen": self._frozen}, files))
        except BaseException:
            self._discard(folder)
            raise
        if self._world.is_main:
            try:
                prune(self._checkpoints, self._config)
            except RunError as error:
                log.warning("what need not stay is left for the next save to remove (%s)", error)
        return size + sum(entry["bytes"] for entry in files.values())

    def _has_frozen(self, state: State) -> bool:
        """Whether there is nothing frozen to write: nothing is frozen, or it is there, and nobody has removed it."""
        if not state.frozen or self._frozen is None:
            return not state.frozen
        folder = self._checkpoints / folders.FROZEN / self._frozen
        return self._together(lambda: not self._world.is_main or folders.frozen_fault(folder) is None)[0]

    def _write_frozen(self, frozen: Mapping[str, Tensor]) -> int:
        """Once in a stage. They are read where they lie, because nothing changes them."""
        above = self._checkpoints / folders.FROZEN
        name = "new"
        if isinstance(above, Path):
            self._main(lambda: above.mkdir(exist_ok=True))
        else:
            name = self._together(lambda: token_hex(8))[0]  # it is written in its place, before its digest is known
        folder = folders.unfinished(above, name)
        try:
            self._main(lambda: folders.begin(above, name))
            store.write(folder, frozen, {name: part(tensor) for name, tensor in frozen.items()}, self._group)
            files = self._files(folder, [""])
            self._frozen = self._together(
                lambda: (folders.commit_frozen if self._world.is_main else folders.frozen_name)(folder, files)
            )[0]
        except BaseException:
            self._discard(folder)
            raise
        return sum(int(entry["bytes"]) for entry in files.values())

    def _files(self, folder: StoragePath, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and checksum of every file that the ranks have written, each read again by the rank that wrote it."""

        def mine() -> dict[str, dict[str, Any]]:
            found = [(part, path) for part in parts for path in store.written_by(folder / part, self._world.rank)]
            return {f"{part}/{path.name}".lstrip("/"): verify.entry(path) for part, path in found}

        files = {name: entry for of_rank in self._together(mine) for name, entry in sorted(of_rank.items())}
        self._main(lambda: _see(folder, files))
        return files

    def _main(self, function: Callable[[], Any]) -> None:
        """Something that the main rank does; where it fails, it fails on every rank."""
        self._together(lambda: function() and None if self._world.is_main else None)

    def _together(self, function: Callable[[], T]) -> list[T]:
        """What `function` gives on every rank; where it fails on one, it fails on every rank."""
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = f"rank {self._world.rank} on {socket.gethostname()}: {plain(caught)}"
        results: list[Any] = [None] * self._world.size
        dist.all_gather_object(results, (value, error), group=self._group)
        if errors := [error for _, error in results if error is not None]:
            raise OSError(errors[0])
        return [value for value, _ in results]

    def _discard(self, folder: StoragePath) -> None:
        """Give back the space of a save that failed."""
        if self._world.is_main:
            folders.discard(folder)


def _see(folder: StoragePath, files: Mapping[str, Any]) -> None:
    """Make sure that this node sees what the others have written."""
    deadline = time.monotonic() + VISIBLE_S
    missing = list(files.keys() - places.sizes(folder).keys())
    while missing := [name for name in missing if not places.there(folder / name)]:
        if time.monotonic() > deadline:
            raise OSError(
                f"does not see {folder / missing[0]}, which another rank has written; run.root and train.checkpoints "
                "must lie on storage that all nodes share"
            )
        time.sleep(0.2)


def plain(error: BaseException) -> str:
    """One line for a person."""
    if isinstance(error, CheckpointException):
        rank, (caught, _) = min(error.failures.items())
        return f"rank {rank}: {plain(caught)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
