"""The folder of a checkpoint: names, atomic commit, retention, and how a path that a user gives becomes one.

checkpoints/step-00000100/         a whole checkpoint: DCP shards and meta.json, which lists every file with its size
checkpoints/step-00000100.tmp/     one being written, or torn by a crash; never read
checkpoints/latest                 the name of the newest whole one, written last
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from emma_train.config.errors import UserError
from emma_train.config.files import write_atomic

log = logging.getLogger(__name__)
META = "meta.json"
LATEST = "latest"
SCHEMA = 1


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def whole(folder: Path) -> dict[str, Any] | None:
    """Metadata of a checkpoint whose files are all there at their size; None where it is torn or is no checkpoint."""
    try:
        meta = json.loads((folder / META).read_text())
        sizes = meta["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return meta


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint of a run; a torn one is named in a warning and skipped."""
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        if folder.suffix == ".tmp":
            continue
        if whole(folder) is not None:
            return folder
        log.warning("%s is incomplete: skipped in favour of the one before it", folder)
    return None


def resolve(path: str | Path, what: str = "init.from") -> Path:
    """The checkpoint that a run folder, a checkpoints folder, `latest` or a step folder stands for. Raises
    UserError."""
    given = Path(path)
    if given.name == LATEST:
        given = given.parent
    for candidate in (given, given / "checkpoints"):
        if whole(candidate) is not None:
            return candidate
        if candidate.is_dir() and (found := newest(candidate)) is not None:
            return found
    if not given.exists():
        raise UserError(f"{what}: {path} does not exist; name a run folder or a checkpoint")
    raise UserError(f"{what}: {path} holds no whole checkpoint (a folder step-* whose {META} and files are complete)")


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; leftovers of a crash are removed."""
    folder = checkpoints / f"{step_name(step)}.tmp"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def commit(folder: Path, meta: dict[str, Any]) -> Path:
    """Make a written folder a checkpoint: metadata with the size of every file, rename, then `latest`."""
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_atomic(folder / META, json.dumps({**meta, "schema": SCHEMA, "files": sizes}, indent=1))
    final = folder.with_suffix("")
    if final.exists():
        shutil.rmtree(final)
    os.replace(folder, final)
    write_atomic(final.parent / LATEST, final.name + "\n")
    return final


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what crashes left behind."""
    folders = sorted(checkpoints.glob("step-*"), reverse=True)
    # A torn folder must not count: it would push out the whole one that a run resumes from.
    kept = [f for f in folders if f.suffix != ".tmp" and whole(f) is not None][: max(1, keep)]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
