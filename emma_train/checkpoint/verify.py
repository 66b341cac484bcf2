"""Checksums, which keep a damaged checkpoint from being loaded: every byte is hashed before it is read for use.

The ranks of a run divide the files of a checkpoint among themselves, so a resume hashes it once in total, not once per
rank.
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
from emma_train.storage.paths import StoragePath, storage_of

log = logging.getLogger(__name__)


def file_entry(path: StoragePath) -> dict[str, Any]:
    """Size and checksum of a file, as metadata lists them. Raises OSError, or StorageError of an object store."""
    with storage_of(path).open(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"bytes": file.seek(0, os.SEEK_END), "sha256": digest}


def find_damage(
    folder: StoragePath,
    parts: Iterable[str] = folders.CHECKPOINT_PARTS,
    world: World | None = None,
    verified: set[StoragePath] | None = None,
) -> str | None:
    """What is wrong with a checkpoint; None where it is valid and every byte of `parts` and of its frozen weights is as
    it was written. With a world every rank calls it, hashes its share, and gets the same answer. Files in `verified`
    are not hashed again; files that prove correct are added to it. Raises RunError, on every rank, where a file cannot
    be read for a moment."""
    problem = world.on_main(lambda: folders.find_problem(folder)) if world else folders.find_problem(folder)
    if problem is not None:
        return problem
    entries = folders.listed_files(folder, parts)
    verified = set() if verified is None else verified
    paths = sorted(entries.keys() - verified)
    if world:
        paths = paths[world.rank :: world.size]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda path: _compare(path, entries[path]), paths))
    verified |= {path for path, result in zip(paths, results, strict=True) if result is None}
    failures = [result for result in results if result is not None]
    if world:
        failures = [failure for of_rank in world.gather(failures) for failure in of_rank]
    for failure in failures:
        if isinstance(failure, RunError):
            raise failure
    problems = [str(failure) for failure in failures]
    more = f" (and {len(problems) - 1} more files)" if problems[1:] else ""
    return problems[0] + more if problems else None


def find_verified(
    path: str | StoragePath, field: str = "init.from", parts: Iterable[str] = ("weights",), world: World | None = None
) -> StoragePath:
    """The newest checkpoint that `path` stands for whose `parts` are intact to the byte. Raises UserError, which names
    `field`. With a world every rank calls it."""
    given = world.on_main(lambda: folders.candidates(path)) if world else folders.candidates(path)
    checkpoint, problems = folders.first_valid(given, lambda folder: find_damage(folder, parts, world))
    if checkpoint is None:
        raise UserError(folders.no_checkpoint_message(path, field, problems))
    return checkpoint


def find_resumable(checkpoints: StoragePath, world: World) -> StoragePath | None:
    """The newest checkpoint of a run that is intact to the byte; None where the run has none yet. Every rank calls it.

    Newer damaged ones are set aside. Raises UserError where there are checkpoints and none is usable: only a person may
    decide to start again from the beginning.
    """
    given = world.on_main(lambda: folders.list_steps(checkpoints))
    checkpoint, problems = folders.first_valid(given, lambda folder: find_damage(folder, world=world))
    if checkpoint is None and given:
        raise UserError(
            f"{checkpoints}: none of its {len(given)} checkpoints can be used ({problems[0]}); bring one back, or move "
            "them away to start from the beginning"
        )
    if checkpoint is not None and world.is_main:
        for damaged in given[: given.index(checkpoint)]:
            try:
                log.warning("%s: set aside as %s", damaged, storage_of(damaged).set_aside(damaged).name)
            except OSError as error:
                log.warning("%s: cannot be renamed (%s)", damaged, error.strerror)
            except RunError as error:
                log.warning("%s cannot be set aside: %s", damaged.name, error)
    return checkpoint


def _compare(path: StoragePath, expected: Any) -> str | RunError | None:
    """What is wrong with a file; a RunError where it cannot be read for a moment; None where it is as it was."""
    name = "/".join(path.parts[-2:])
    try:
        actual = file_entry(path)
    except RunError as error:
        return error
    except OSError as error:
        try:
            folders.check_gone(path, error)
        except RunError as failure:
            return failure
        return f"{name} is missing on {socket.gethostname()}"
    if actual == expected:
        return None
    return f"{name} is damaged: SHA-256 {actual['sha256'][:8]}…, not {expected['sha256'][:8]}…"
