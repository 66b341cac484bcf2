"""Writes local checkpoints: shards to each rank's node, a copy to the next node, checksums, then the commit."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from torch import Tensor

from emma_train.checkpoint import dcp, peer_copy, verify
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.local_folder import LOCAL, START, remove_local
from emma_train.checkpoint.nodes import Nodes, this_node
from emma_train.checkpoint.save_group import SaveGroup
from emma_train.checkpoint.state import CheckpointState
from emma_train.storage.paths import StoragePath, storage_of


class LocalWriter:
    """Writes the local checkpoints of a run. A failure on one rank makes the write fail on every rank."""

    def __init__(self, folder: Path, checkpoints: StoragePath, group: SaveGroup) -> None:
        """`folder`: that of this node for the run; `checkpoints`: those on shared storage."""
        self._folder = folder
        self._checkpoints = checkpoints
        self._group = group
        self._rank = group.world.rank
        self._nodes = Nodes(group.world.gather(this_node()))
        self._start: str | None = None

    def write(
        self,
        state: CheckpointState,
        values: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        frozen: str | None,
        after: int | None,
    ) -> int:
        """Write, copy, check and commit, then remove older ones. `frozen`: the frozen weights on shared storage;
        `after`: step of the newest checkpoint there. Returns the number of new bytes, copies not counted. Raises
        OSError, RunError, CheckpointException, or RuntimeError where a rank is gone."""
        folder = self._folder / folders.step_name(int(meta["step"]))
        storage = storage_of(folder)
        written = storage.unpublished(folder)
        try:
            self._on_each_node(lambda: storage.start_folder(folder))
            for part, tensors in state.parts.items():
                key = f"local-{part}-{self._group.num_failures}"
                dcp.write_dcp(written / part, tensors, values, self._group.process_group, key=key)
            files = self._copy_files(written, list(state.parts))
            # Some values of the metadata are known to the main rank alone.
            shared_meta = {**meta, "frozen": frozen, LOCAL: {"start": self._ensure_start(), "after": after}}
            shared_meta = self._group.on_all(lambda: shared_meta if self._rank == 0 else {})[0]
            text = folders.with_checksum({**shared_meta, "schema": folders.SCHEMA, "files": files})
            self._on_each_node(lambda: storage.publish(written, folder, text))
        except BaseException:
            if self._nodes.is_first(self._rank):
                storage.discard(written)
            raise
        self.remove_older(keep=folder.name)  # only now is the new one complete on all nodes
        return sum(int(entry["bytes"]) for entry in files.values())

    def remove_older(self, keep: str = "") -> None:
        """Remove the local checkpoints from this node but the one of the name `keep`: a newer one is complete, there or
        on shared storage."""
        if self._nodes.is_first(self._rank):
            remove_local(self._folder, keep)

    def clear(self) -> None:
        """Remove the run's folder from this node: a newer checkpoint is on shared storage, and no more will follow."""
        if self._nodes.is_first(self._rank):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _copy_files(self, written: Path, parts: list[str]) -> dict[str, dict[str, Any]]:
        """Copy this rank's files to the next node. Returns size and checksum of the files of all ranks, by path.

        Each rank reads its files again, and hashes what it sends and what it receives."""
        to, copied = self._nodes.copy_rank(self._rank), self._nodes.copied_ranks(self._rank)
        hashes: peer_copy.Hashes = {}

        def local_sizes() -> list[tuple[str, int]]:
            paths = [(part, path) for part in parts for path in dcp.files_of_rank(written / part, self._rank)]
            return [(f"{part}/{path.name}", storage_of(path).size(path)) for part, path in paths]

        sizes = self._group.on_all(local_sizes)

        def exchange() -> dict[str, dict[str, Any]]:
            received = {rank: sizes[rank] for rank in copied}
            hashes.update(peer_copy.exchange_files(written, to, sizes[self._rank], received, self._group.process_group))
            if to is None:
                return {name: verify.file_entry(written / name) for name, _ in sizes[self._rank]}
            return {name: {"bytes": size, "sha256": hashes[name]} for name, size in sizes[self._rank]}

        by_rank = self._group.on_all(exchange)

        def check() -> None:
            for rank in copied:
                for name, entry in by_rank[rank].items():
                    if hashes[name] != entry["sha256"]:
                        raise OSError(f"the copy of {name} differs from the file that rank {rank} sent")

        self._group.on_all(check)
        return {name: entry for entries in by_rank for name, entry in sorted(entries.items())}

    def _ensure_start(self) -> str:
        """Make this start the one whose local checkpoints count, before its first one is complete."""
        if self._start is None:
            start = self._group.on_all(lambda: token_hex(8))[0]
            storage = storage_of(self._checkpoints)
            self._group.on_main(lambda: storage.write(self._checkpoints / START, start.encode()))
            self._start = start
        return self._start

    def _on_each_node(self, function: Callable[[], Any]) -> None:
        """Call `function` on the first rank of each node. A failure is raised on every rank."""
        self._group.on_all(lambda: function() and None if self._nodes.is_first(self._rank) else None)
