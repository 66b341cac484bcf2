"""One checkpoint written by all ranks together: shards, then checksums, then the commit."""

import logging
import time
from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any

from torch import Tensor

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.retention import prune
from emma_train.checkpoint.save_group import SaveGroup
from emma_train.checkpoint.state import CheckpointState, local_part
from emma_train.config.schema import TrainConfig
from emma_train.errors import RunError
from emma_train.storage.paths import StoragePath, storage_of

log = logging.getLogger(__name__)
VISIBLE_S = 90.0
"""Longest time until the main rank sees a file that another node has written; network file systems cache listings."""


class CheckpointWriter:
    """Writes checkpoints into one folder. A failure on one rank makes the write fail on every rank."""

    def __init__(self, checkpoints: StoragePath, config: TrainConfig, group: SaveGroup) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._world = group.world
        self._group = group
        self._storage = storage_of(checkpoints)
        self._frozen: str | None = None

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
            self._group.on_main(lambda: folders.start_folder(self._checkpoints, name))
            size = 0 if self._has_frozen(state) else self._write_frozen(state.frozen)
            for part, tensors in state.parts.items():
                key = f"{part}-{self._group.num_failures}"
                dcp.write_dcp(folder / part, tensors, values, self._group.process_group, key=key)
            files = self._file_entries(folder, list(state.parts))
            self._group.on_main(lambda: folders.commit_checkpoint(folder, {**meta, "frozen": self._frozen}, files))
        except BaseException:
            self._discard(folder)
            raise
        if self._world.is_main:
            try:
                prune(self._checkpoints, self._config)
            except RunError as error:
                log.warning("old checkpoints are left for the next save to remove (%s)", error)
        return size + sum(entry["bytes"] for entry in files.values())

    def ensure_frozen(self, state: CheckpointState) -> str | None:
        """The name of the stored frozen weights, which are written if this run has not done so yet; None where the
        state has none. Raises as `write` does."""
        if state.frozen and self._frozen is None:
            self._write_frozen(state.frozen)
        return self._frozen

    def _has_frozen(self, state: CheckpointState) -> bool:
        """Whether no frozen weights need writing: there are none, or they are stored and nobody has removed them."""
        if not state.frozen or self._frozen is None:
            return not state.frozen
        folder = self._checkpoints / folders.FROZEN / self._frozen
        return self._group.on_all(lambda: not self._world.is_main or folders.find_frozen_problem(folder) is None)[0]

    def _write_frozen(self, frozen: Mapping[str, Tensor]) -> int:
        """Write the frozen weights, once in a stage, from the live tensors: nothing changes them."""
        parent = self._checkpoints / folders.FROZEN
        self._group.on_main(lambda: self._storage.make_folder(parent))
        # Without a rename the name is needed before the digest is known.
        name = "new" if self._storage.can_rename else self._group.on_all(lambda: token_hex(8))[0]
        folder = self._storage.unpublished(parent / name)
        try:
            self._group.on_main(lambda: folders.start_folder(parent, name))
            values = {name: local_part(t) for name, t in frozen.items()}
            dcp.write_dcp(folder, frozen, values, self._group.process_group)
            files = self._file_entries(folder, [""])
            commit = folders.commit_frozen if self._world.is_main else folders.frozen_name
            self._frozen = self._group.on_all(lambda: commit(folder, files))[0]
        except BaseException:
            self._discard(folder)
            raise
        return sum(int(entry["bytes"]) for entry in files.values())

    def _file_entries(self, folder: StoragePath, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and checksum of every file that the ranks have written. Each rank reads its files again."""

        def local_entries() -> dict[str, dict[str, Any]]:
            paths = [(part, path) for part in parts for path in dcp.files_of_rank(folder / part, self._world.rank)]
            return {f"{part}/{path.name}".lstrip("/"): verify.file_entry(path) for part, path in paths}

        files = {
            name: entry for of_rank in self._group.on_all(local_entries) for name, entry in sorted(of_rank.items())
        }
        self._group.on_main(lambda: wait_until_visible(folder, files))
        return files

    def _discard(self, folder: StoragePath) -> None:
        """Free the space of a save that failed."""
        if self._world.is_main:
            self._storage.discard(folder)


def wait_until_visible(folder: StoragePath, files: Mapping[str, Any]) -> None:
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
