"""Checksums: what keeps a damaged checkpoint from being loaded. Every byte that is going to be read is hashed first.

The ranks of a run share the files of a checkpoint among them, so a resume reads it once more in all, not once per rank.
"""

import hashlib
import logging
import os
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from emma_train.checkpoint import folder as folders
from emma_train.engine.world import World
from emma_train.errors import RunError, UserError
from emma_train.storage import paths as places
from emma_train.storage.paths import StoragePath

log = logging.getLogger(__name__)


def entry(path: StoragePath) -> dict[str, Any]:
    """Size and checksum of a file, as metadata lists them. Raises OSError, or RunError where a store fails."""
    with places.asking(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"bytes": file.seek(0, os.SEEK_END), "sha256": digest}


def fault(
    folder: StoragePath,
    parts: Iterable[str] = folders.PARTS,
    world: World | None = None,
    sound: set[StoragePath] | None = None,
) -> str | None:
    """What is wrong with a checkpoint; None where it is whole and every byte of `parts` and of its frozen weights is as
    it was written. With a world every rank calls it, hashes its share, and gets the same answer. Files in `sound` are
    taken as read, and what is found good is added to them."""
    problem = world.on_main(lambda: folders.fault(folder)) if world else folders.fault(folder)
    if problem is not None:
        return problem
    content, sound = folders.content(folder, parts), set() if sound is None else sound
    mine = sorted(content.keys() - sound)
    if world:
        mine = mine[world.rank :: world.size]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(lambda path: _difference(path, content[path]), mine))
    sound |= {path for path, problem in zip(mine, problems, strict=True) if problem is None}
    found = [problem for problem in problems if problem is not None]
    if world:
        found = [problem for of_rank in world.gather(found) for problem in of_rank]
    more = f" (and {len(found) - 1} more files)" if found[1:] else ""
    return found[0] + more if found else None


def resolve(
    path: str | StoragePath, what: str = "init.from", parts: Iterable[str] = ("weights",), world: World | None = None
) -> StoragePath:
    """The newest checkpoint that `path` stands for and that is whole to the byte in `parts`. Raises UserError; with a
    world every rank calls it."""
    given = world.on_main(lambda: folders.candidates(path)) if world else folders.candidates(path)
    found, faults = folders.choose(given, lambda folder: fault(folder, parts, world))
    if found is None:
        raise UserError(folders.none_at(path, what, faults))
    return found


def to_resume(checkpoints: StoragePath, world: World) -> StoragePath | None:
    """The newest checkpoint of a run that is whole to the byte; None where the run has none yet. Every rank calls it.

    Damaged ones that are newer are set aside. Raises UserError where there are checkpoints and none can be used:
    starting again from the beginning is for a person to decide.
    """
    given = world.on_main(lambda: folders.steps(checkpoints))
    found, faults = folders.choose(given, lambda folder: fault(folder, world=world))
    if found is None and given:
        raise UserError(
            f"{checkpoints}: none of its {len(given)} checkpoints can be used ({faults[0]}); bring one back, or move "
            "them away to start from the beginning"
        )
    if found is not None and world.is_main:
        for damaged in given[: given.index(found)]:
            try:
                log.warning("%s: set aside as %s", damaged, folders.set_aside(damaged).name)
            except OSError as error:
                log.warning("%s: cannot be renamed (%s)", damaged, error.strerror)
            except RunError as error:
                log.warning("%s cannot be set aside: %s", damaged.name, error)
    return found


def _difference(path: StoragePath, expected: Any) -> str | None:
    name = "/".join(path.parts[-2:])
    try:
        found = entry(path)
    except OSError as error:
        return f"{name}: {error.strerror or 'is missing'} on {socket.gethostname()}"
    if found == expected:
        return None
    return f"{name} is damaged: SHA-256 {found['sha256'][:8]}…, not {expected['sha256'][:8]}…"
