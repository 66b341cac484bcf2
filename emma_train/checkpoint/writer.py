"""One checkpoint written by all ranks together: shards, then checksums, then the commit."""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from secrets import token_hex
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.retention import prune
from emma_train.checkpoint.state import CheckpointState, local_part
from emma_train.config.schema import TrainConfig
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.storage.paths import StoragePath, storage_of

log = logging.getLogger(__name__)
_T = TypeVar("_T")
VISIBLE_S = 90.0
"""Longest time until the main rank sees a file that another node has written; network file systems cache listings."""


class CheckpointWriter:
    """Writes checkpoints into one folder. A failure on one rank makes the write fail on every rank."""

    def __init__(self, checkpoints: StoragePath, config: TrainConfig, world: World, timeout_s: float) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._world = world
        self._timeout_s = timeout_s
        self._storage = storage_of(checkpoints)
        self._frozen: str | None = None
        self._failures = -1
        self.renew()

    def renew(self) -> None:
        """After a failure, drop what ranks may no longer have in common: the process group, which is unusable after a
        timeout, and the cached plans, which some ranks may lack."""
        # Collectives of a save run at the same time as those of training, so they need another group.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
        self._failures += 1

    def resume_from(self, checkpoint: StoragePath, state: CheckpointState) -> None:
        """After a resume: reuse the stored frozen weights unless the recipe now freezes other parameters."""
        frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
        if frozen is not None and frozen.parent == self._checkpoints / folders.FROZEN:
            self._frozen = frozen.name if dcp.tensor_names(frozen) == state.frozen.keys() else None

    def write(self, state: CheckpointState, values: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
        """Write, check, commit and prune. `state` gives the layout, `values` this rank's content by name. Returns the
        number of new bytes. Raises OSError, RunError or CheckpointException."""
        name = folders.step_name(int(meta["step"]))
        folder = self._storage.unpublished(self._checkpoints / name)
        try:
            self._on_main(lambda: folders.start_folder(self._checkpoints, name))
            size = 0 if self._has_frozen(state) else self._write_frozen(state.frozen)
            for part, tensors in state.parts.items():
                dcp.write_dcp(folder / part, tensors, values, self._group, key=f"{part}-{self._failures}")
            files = self._file_entries(folder, list(state.parts))
            self._on_main(lambda: folders.commit_checkpoint(folder, {**meta, "frozen": self._frozen}, files))
        except BaseException:
            self._discard(folder)
            raise
        if self._world.is_main:
            try:
                prune(self._checkpoints, self._config)
            except RunError as error:
                log.warning("old checkpoints are left for the next save to remove (%s)", error)
        return size + sum(entry["bytes"] for entry in files.values())

    def _has_frozen(self, state: CheckpointState) -> bool:
        """Whether no frozen weights need writing: there are none, or they are stored and nobody has removed them."""
        if not state.frozen or self._frozen is None:
            return not state.frozen
        folder = self._checkpoints / folders.FROZEN / self._frozen
        return self._on_all(lambda: not self._world.is_main or folders.find_frozen_problem(folder) is None)[0]

    def _write_frozen(self, frozen: Mapping[str, Tensor]) -> int:
        """Write the frozen weights, once in a stage, from the live tensors: nothing changes them."""
        parent = self._checkpoints / folders.FROZEN
        self._on_main(lambda: self._storage.make_folder(parent))
        # Without a rename the name is needed before the digest is known.
        name = "new" if self._storage.can_rename else self._on_all(lambda: token_hex(8))[0]
        folder = self._storage.unpublished(parent / name)
        try:
            self._on_main(lambda: folders.start_folder(parent, name))
            dcp.write_dcp(folder, frozen, {name: local_part(t) for name, t in frozen.items()}, self._group)
            files = self._file_entries(folder, [""])
            commit = folders.commit_frozen if self._world.is_main else folders.frozen_name
            self._frozen = self._on_all(lambda: commit(folder, files))[0]
        except BaseException:
            self._discard(folder)
            raise
        return sum(int(entry["bytes"]) for entry in files.values())

    def _file_entries(self, folder: StoragePath, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and checksum of every file that the ranks have written. Each rank reads its files again."""

        def local_entries() -> dict[str, dict[str, Any]]:
            paths = [(part, path) for part in parts for path in dcp.files_of_rank(folder / part, self._world.rank)]
            return {f"{part}/{path.name}".lstrip("/"): verify.file_entry(path) for part, path in paths}

        files = {name: entry for of_rank in self._on_all(local_entries) for name, entry in sorted(of_rank.items())}
        self._on_main(lambda: _wait_until_visible(folder, files))
        return files

    def _on_main(self, function: Callable[[], Any]) -> None:
        """Call `function` on the main rank. Its failure is raised on every rank."""
        self._on_all(lambda: function() and None if self._world.is_main else None)

    def _on_all(self, function: Callable[[], _T]) -> list[_T]:
        """Results of `function` on every rank. A failure on one is raised on every rank."""
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = f"rank {self._world.rank} on {socket.gethostname()}: {one_line(caught)}"
        results: list[Any] = [None] * self._world.size
        dist.all_gather_object(results, (value, error), group=self._group)
        if errors := [error for _, error in results if error is not None]:
            raise OSError(errors[0])
        return [value for value, _ in results]

    def _discard(self, folder: StoragePath) -> None:
        """Free the space of a save that failed."""
        if self._world.is_main:
            self._storage.discard(folder)


def _wait_until_visible(folder: StoragePath, files: Mapping[str, Any]) -> None:
    """Wait until this node sees the files that all nodes have written. Raises OSError after VISIBLE_S."""
    storage = storage_of(folder)
    deadline = time.monotonic() + VISIBLE_S
    missing = list(files.keys() - storage.listed_sizes(folder).keys())
    while missing := [name for name in missing if not storage.exists(folder / name)]:
        if time.monotonic() > deadline:
            raise OSError(
                f"does not see {folder / missing[0]}, which another rank has written; run.root and train.checkpoints "
                "must lie on storage that all nodes share"
            )
        time.sleep(0.2)


def one_line(error: BaseException) -> str:
    """An error in one line for a person."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {one_line(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
