"""The folder of a checkpoint: names, what makes it whole, atomic commit, and how a path that a user gives becomes one.

checkpoints/step-00000100/            a whole checkpoint
    meta.json                         what it is, and size and SHA-256 of every file; written last
    weights/ optimizer/               DCP folders: .metadata and one file of shards per rank
checkpoints/frozen/DIGEST/            weights that cannot change in the stage, stored once; DIGEST is of their shards
checkpoints/step-00000100.tmp/        one being written, or torn by a crash; never read
checkpoints/step-00000100.removed/    one on its way out
checkpoints/step-00000100.damaged/    one that was found damaged at a resume, and set aside
checkpoints/latest                    the name of the newest whole one, written last

A frozen folder may also lie in the checkpoint itself (step-00000100/frozen/DIGEST), which makes it self-contained.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from emma_train.config.errors import UserError
from emma_train.config.files import write_atomic

log = logging.getLogger(__name__)
META = "meta.json"
LATEST = "latest"
FROZEN = "frozen"
PARTS = ("weights", "optimizer")
SCHEMA = 2
Files = Mapping[str, Mapping[str, Any]]
"""Size and checksum of files by their path below a folder: {"weights/.metadata": {"bytes": 1, "sha256": "..."}}."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Metadata of a folder, whether its files are all there or not; None where it has none or a byte of it is wrong."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _checksum(meta):
        return None
    return meta


def frozen_folder(folder: Path, meta: Mapping[str, Any]) -> Path | None:
    """Where the frozen weights that a checkpoint refers to lie, in it or beside it; None where it refers to none."""
    if not (digest := meta.get("frozen")):
        return None
    inside = folder / FROZEN / digest
    return inside if inside.is_dir() else folder.parent / FROZEN / digest


def content(folder: Path, parts: Iterable[str] = PARTS) -> dict[Path, Mapping[str, Any]]:
    """Size and checksum of every file of a whole checkpoint's `parts`, and of the frozen weights it refers to."""
    meta = read_meta(folder) or {}
    wanted = tuple(f"{part}/" for part in parts)
    found = {folder / name: entry for name, entry in meta["files"].items() if name.startswith(wanted)}
    if (frozen := frozen_folder(folder, meta)) is not None:
        found |= {frozen / name: entry for name, entry in (read_meta(frozen) or {})["files"].items()}
    return found


def fault(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, by its names and sizes alone; None where nothing does."""
    meta = read_meta(folder)
    if meta is None:
        return f"{META} is missing or torn" if folder.is_dir() else "is not there"
    if meta.get("schema") != SCHEMA or not isinstance(meta.get("files"), dict):
        return f"{META} is not of this version (schema {meta.get('schema')}, not {SCHEMA})"
    if folder.name.startswith("step-") and folder.name != step_name(meta.get("step", -1)):
        return f"{META} says step {meta.get('step')}: it is not the checkpoint that its name says"
    if problem := _wrong_size(folder, meta["files"]):
        return problem
    frozen = frozen_folder(folder, meta)
    return None if frozen is None else frozen_fault(frozen)


def frozen_fault(frozen: Path) -> str | None:
    """The same for frozen weights."""
    meta = read_meta(frozen)
    if meta is None or not isinstance(meta.get("files"), dict):
        return f"the frozen weights that it refers to are missing ({FROZEN}/{frozen.name} beside it)"
    if digest_of(meta["files"]) != frozen.name:
        return f"{FROZEN}/{frozen.name}/{META} is not what its name says"
    problem = _wrong_size(frozen, meta["files"])
    return f"{FROZEN}/{frozen.name}/{problem}" if problem else None


def whole(folder: Path) -> dict[str, Any] | None:
    """Metadata of a checkpoint whose files are all there at their size; None where it is torn or is no checkpoint."""
    return read_meta(folder) if fault(folder) is None else None


def steps(checkpoints: Path) -> list[Path]:
    """The folders of a run that call themselves checkpoints, the newest first."""
    named = [p for p in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()]
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def candidates(path: str | Path) -> list[Path]:
    """What a run folder, a checkpoints folder, `latest` or a step folder may stand for, the newest first."""
    given = Path(path)
    if given.name == LATEST and not given.is_dir():
        given = given.parent
    if (given / META).is_file():
        return [given]
    return steps(given) or steps(given / "checkpoints")


def choose(folders: Iterable[Path], fault: Callable[[Path], str | None] = fault) -> tuple[Path | None, list[str]]:
    """The first folder without a fault, and the faults of those before it, each of which a warning names."""
    faults: list[str] = []
    for folder in folders:
        if (problem := fault(folder)) is None:
            return folder, faults
        log.warning("%s cannot be used: %s. Skipped in favour of the one before it", folder, problem)
        faults.append(f"{folder.name}: {problem}")
    return None, faults


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint of a run, by names and sizes; says nothing of others."""
    return next((folder for folder in steps(checkpoints) if fault(folder) is None), None)


def resolve(path: str | Path, what: str = "init.from") -> Path:
    """The newest whole checkpoint that `path` stands for, by names and sizes. Raises UserError."""
    found, faults = choose(candidates(path))
    if found is None:
        raise UserError(none_at(path, what, faults))
    return found


def none_at(path: str | Path, what: str, faults: list[str]) -> str:
    """The message where `path` stands for no checkpoint that can be used."""
    if not Path(path).exists():
        return f"{what}: {path} does not exist; name a run folder or a checkpoint"
    why = faults[0] if faults else f"a folder step-* with a {META} and all of its files"
    return f"{what}: {path} holds no whole checkpoint ({why})"


def begin(checkpoints: Path, name: str) -> Path:
    """An empty folder NAME.tmp to write into; leftovers of a crash are removed. Raises OSError where `checkpoints` is
    not there: it may be storage that has gone, and a mount point would take anything."""
    folder = checkpoints / f"{name}.tmp"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def commit(folder: Path, meta: Mapping[str, Any], files: Files) -> Path:
    """Make a written folder step-*.tmp a checkpoint: metadata, rename, then `latest`."""
    final = folder.with_suffix("")
    _finish(folder, {**meta, "schema": SCHEMA, "files": files}, final)
    write_atomic(final.parent / LATEST, final.name + "\n")
    return final


def commit_frozen(folder: Path, files: Files) -> str:
    """Make a written folder frozen/*.tmp the frozen weights of its content; returns their digest."""
    digest = digest_of(files)
    _finish(folder, {"files": files}, folder.parent / digest)
    return digest


def digest_of(files: Files) -> str:
    """The name of frozen weights: a hash over the sizes and checksums of their shards."""
    # Tables of contents hold the time and place of writing, so the same weights would get other names.
    return _checksum({name: entry for name, entry in files.items() if not name.endswith(".metadata")})[:16]


def remove(folder: Path) -> None:
    """Remove a folder so that a crash on the way leaves no half of it under its name."""
    shutil.rmtree(_rename(folder, ".removed"), ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts as none and is there to be looked at; returns its new path."""
    return _rename(folder, ".damaged")


def _rename(folder: Path, suffix: str) -> Path:
    renamed = folder.with_name(folder.name + suffix)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(folder, renamed)
    return renamed


def _finish(folder: Path, meta: Mapping[str, Any], final: Path) -> None:
    write_atomic(folder / META, json.dumps({**meta, "checksum": _checksum(meta)}, indent=1))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)
    former = _rename(final, ".removed") if final.exists() else None
    os.replace(folder, final)
    _sync(final.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wrong_size(folder: Path, files: Files) -> str | None:
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
    return None
