"""Copies the newest local checkpoint to shared storage, where it is an ordinary checkpoint, before a run resumes.

So a resume needs no second way to load: any number of ranks and nodes can read all files, which are verified as ever.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.local_folder import LOCAL, intact_files, is_continued, read_start
from emma_train.checkpoint.nodes import Nodes, this_node
from emma_train.checkpoint.writer import wait_until_visible
from emma_train.engine.world import World
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath, storage_of

log = logging.getLogger(__name__)
COPY_BYTES = 16 << 20
_T = TypeVar("_T")


@dataclass(frozen=True)
class LocalPart:
    """What one node has of a local checkpoint."""

    node: str
    step: int
    checksum: str
    """Of the metadata, which is the same on all nodes."""
    files: frozenset[str]
    """All files of the checkpoint, those of other nodes too, relative to its folder."""
    intact: frozenset[str]
    """Those that the node has, as far as sizes tell."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A local checkpoint that nodes can put together."""

    step: int
    checksum: str
    nodes: Mapping[str, tuple[str, ...]]
    """By file, the nodes that have it."""


def local_checkpoints(parts: Iterable[LocalPart], newer_than: int) -> tuple[list[LocalCheckpoint], list[str]]:
    """The local checkpoints after the step `newer_than` of which every file is on some node, the newest first; and for
    each of the others a line that says what is missing."""
    by_checkpoint: dict[tuple[int, str], list[LocalPart]] = {}
    for part in parts:
        if part.step > newer_than:
            by_checkpoint.setdefault((part.step, part.checksum), []).append(part)
    complete, problems = [], []
    for (step, checksum), group in sorted(by_checkpoint.items(), reverse=True):
        nodes = {name: tuple(part.node for part in group if name in part.intact) for name in sorted(group[0].files)}
        missing = [name for name, having in nodes.items() if not having]
        if missing:
            more = f" and {len(missing) - 1} more files" * bool(missing[1:])
            problems.append(f"step {step}: no node has {missing[0]}{more}")
        else:
            complete.append(LocalCheckpoint(step, checksum, nodes))
    return complete, problems


def assign_ranks(nodes: Mapping[str, Sequence[str]], ranks: Nodes) -> dict[str, int]:
    """By file, the rank that copies it: on the first node that has it, the ranks of which take turns."""
    taken = dict.fromkeys(ranks.names, 0)
    assigned = {}
    for name, having in nodes.items():
        of_node = ranks.of(having[0])
        assigned[name] = of_node[taken[having[0]] % len(of_node)]
        taken[having[0]] += 1
    return assigned


def restore_local(
    folder: Path, checkpoints: StoragePath, world: World, accepts: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Make the newest local checkpoint that the nodes have a checkpoint on shared storage, unless that has a newer one.

    `folder`: that of this node; `accepts(meta)`: whether the run may go on from a checkpoint. Every rank calls it.
    Raises RunError where shared storage fails: local checkpoints then stay as they are.
    """
    shared = world.on_main(partial(_storage_errors, lambda: _shared_state(checkpoints)))
    if shared is None:
        return
    nodes = Nodes(world.gather(this_node()))
    parts: list[LocalPart] = []
    if nodes.is_first(world.rank):
        parts = _parts_of_node(folder, lambda meta: accepts(meta) and is_continued(meta, shared.start, shared.steps))
    of_all = [part for of_rank in world.gather(parts) for part in of_rank]
    complete, problems = local_checkpoints(of_all, shared.newest)
    for problem in problems if world.is_main else []:
        log.warning("local checkpoint of %s; an older checkpoint is used", problem)
    for checkpoint in complete:
        if _publish(checkpoint, folder, checkpoints, world, nodes):
            return


@dataclass(frozen=True)
class _Shared:
    """What shared storage says."""

    start: str
    """The start whose local checkpoints count."""
    steps: list[int]
    """Steps of its checkpoints, valid or not."""
    newest: int
    """Step of the newest that is valid by names and sizes; -1 where there is none."""


def _shared_state(checkpoints: StoragePath) -> _Shared | None:
    """None where the run has made no local checkpoints."""
    if (start := read_start(checkpoints)) is None:
        return None
    steps = [folders.step_of(folder) for folder in folders.list_steps(checkpoints)]
    newest = folders.newest_checkpoint(checkpoints)
    return _Shared(start, steps, -1 if newest is None else folders.step_of(newest))


def _read_meta(folder: StoragePath) -> dict[str, Any] | None:
    """Metadata of a node's part of a local checkpoint; None where it cannot be used. Raises nothing, for other ranks
    would wait."""
    try:
        meta = folders.read_meta(folder)
    except (RunError, UserError) as error:
        log.warning("%s", error)
        return None
    is_usable = meta is not None and isinstance(meta.get("files"), dict) and meta.get("schema") == folders.SCHEMA
    return meta if is_usable else None


def _parts_of_node(folder: Path, accepts: Callable[[dict[str, Any]], bool]) -> list[LocalPart]:
    parts = []
    for path in folders.list_steps(folder):
        if (meta := _read_meta(path)) is None:
            log.warning("%s on %s cannot be used: %s is missing or damaged", path, this_node(), folders.META)
        elif accepts(meta):
            intact = frozenset(intact_files(path, meta))
            parts.append(LocalPart(this_node(), meta["step"], folders.checksum(meta), frozenset(meta["files"]), intact))
    return parts


def _publish(checkpoint: LocalCheckpoint, folder: Path, checkpoints: StoragePath, world: World, nodes: Nodes) -> bool:
    """Copy the files to shared storage, each from a node where it proves intact, and commit. Returns whether every file
    was intact somewhere."""
    name, started = folders.step_name(checkpoint.step), time.perf_counter()
    meta = _meta_on_all(folder / name, checkpoint, world)
    storage, files = storage_of(checkpoints), meta["files"]
    written = storage.unpublished(checkpoints / name)
    world.on_main(partial(_storage_errors, lambda: folders.start_folder(checkpoints, name) and None))
    remaining = dict(checkpoint.nodes)
    while remaining and all(remaining.values()):
        assigned = assign_ranks(remaining, nodes)
        of_rank = [file for file, rank in assigned.items() if rank == world.rank]
        damaged = _copy_files(folder / name, written, {file: files[file] for file in of_rank}, world)
        remaining = {file: having[1:] for file, having in remaining.items() if file in damaged}
    if remaining:
        if world.is_main:
            log.warning("local checkpoint of step %d: %s is damaged on every node", checkpoint.step, min(remaining))
            storage.discard(written)
        return False

    def commit() -> None:
        wait_until_visible(written, files)
        shared_meta = {key: value for key, value in meta.items() if key not in (LOCAL, "files", "schema")}
        folders.commit_checkpoint(written, shared_meta, files)

    world.on_main(partial(_storage_errors, commit))
    if world.is_main:
        seconds = time.perf_counter() - started
        log.info("local checkpoint of step %d: copied to %s in %.1f s", checkpoint.step, checkpoints / name, seconds)
    return True


def _copy_files(source: Path, target: StoragePath, files: folders.FileEntries, world: World) -> set[str]:
    """Copy this rank's share of files. Every rank calls it. Returns the files that are damaged, over all ranks. Raises
    RunError, on all ranks, where the target cannot be written."""
    damaged: set[str] = set()
    error: RunError | None = None
    try:
        for file, entry in files.items():
            if problem := _storage_errors(partial(_copy, source / file, target / file, entry)):
                log.warning("%s on %s %s", source / file, this_node(), problem)
                damaged.add(file)
    except RunError as caught:
        error = caught
    outcomes = world.gather((damaged, error))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return {file for of_rank, _ in outcomes for file in of_rank}


def _meta_on_all(folder: Path, checkpoint: LocalCheckpoint, world: World) -> dict[str, Any]:
    """The metadata of a local checkpoint, on every rank, whether or not its node has it."""
    meta = _read_meta(folder)
    matches = meta is not None and folders.checksum(meta) == checkpoint.checksum
    rank = world.gather(matches).index(True)
    metas: list[dict[str, Any]] = [m for m in world.gather(meta if world.rank == rank else None) if m is not None]
    return metas[0]


def _copy(source: Path, target: StoragePath, entry: Mapping[str, Any]) -> str | None:
    """Copy a file. Returns what is wrong with the source; None where it is as it was written. Raises OSError of the
    target."""
    digest, storage = hashlib.sha256(), storage_of(target)
    storage.make_folder(target.parent)
    try:
        file = open(source, "rb")  # noqa: SIM115 - errors of the target must not count as those of the source
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    with file, storage.create(target) as copy:
        while True:
            try:
                part = file.read(COPY_BYTES)
            except OSError as error:
                return f"cannot be read ({error.strerror})"
            if not part:
                break
            digest.update(part)
            copy.write(part)
    return None if digest.hexdigest() == entry["sha256"] else "is damaged: its SHA-256 is another one"


def _storage_errors(function: Callable[[], _T]) -> _T:
    """Call a function. Turns OSError of shared storage into RunError."""
    try:
        return function()
    except OSError as error:
        raise RunError(
            f"{error.filename or 'shared storage'}: {error.strerror or error}; a local checkpoint needs it. Repair it, "
            "then run the same command again"
        ) from None
