"""The folder of a checkpoint: names, what makes it whole, atomic commit, and how a path that a user gives becomes one.

checkpoints/step-00000100/            a whole checkpoint
    meta.json                         what it is, and size and SHA-256 of every file; written last
    weights/ optimizer/               DCP folders: .metadata and one file of shards per rank
checkpoints/frozen/DIGEST/            weights that cannot change in the stage, stored once; DIGEST is of their shards
checkpoints/step-00000100.tmp/        one being written, or torn by a crash; never read
checkpoints/step-00000100.removed/    one on its way out
checkpoints/step-00000100.damaged/    one that was found damaged at a resume, and set aside
checkpoints/latest                    the name of the newest whole one, written last

A store renames nothing (place.py): there step-00000100 is written in its place and is a checkpoint once it has its
meta.json, which is removed first where it goes, and becomes meta.json.damaged where it is set aside. Frozen weights
have a random name there, which their meta.json repeats, because their digest is known too late.

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

from upath import UPath

from emma_train.config.load import load_yaml
from emma_train.errors import RunError, UserError
from emma_train.storage import paths as places
from emma_train.storage.files import write_atomic
from emma_train.storage.paths import StoragePath

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


def read_meta(folder: StoragePath) -> dict[str, Any] | None:
    """Metadata of a folder, whether its files are all there or not; None where it has none or a byte of it is wrong.
    Raises RunError where a store does not say, as do all that call it."""
    try:
        with places.asking(folder):
            text = (folder / META).read_bytes()
        meta = json.loads(text)
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _checksum(meta):
        return None
    return meta


def frozen_folder(folder: StoragePath, meta: Mapping[str, Any]) -> StoragePath | None:
    """Where the frozen weights that a checkpoint refers to lie, in it or beside it; None where it refers to none."""
    if not (digest := meta.get("frozen")):
        return None
    inside = folder / FROZEN / digest
    return inside if _is_there(inside) else folder.parent / FROZEN / digest


def content(folder: StoragePath, parts: Iterable[str] = PARTS) -> dict[StoragePath, Mapping[str, Any]]:
    """Size and checksum of every file of a whole checkpoint's `parts`, and of the frozen weights it refers to."""
    meta = read_meta(folder) or {}
    wanted = tuple(f"{part}/" for part in parts)
    found = {folder / name: entry for name, entry in meta["files"].items() if name.startswith(wanted)}
    if (frozen := frozen_folder(folder, meta)) is not None:
        found |= {frozen / name: entry for name, entry in (read_meta(frozen) or {})["files"].items()}
    return found


def fault(folder: StoragePath) -> str | None:
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


def frozen_fault(frozen: StoragePath) -> str | None:
    """The same for frozen weights."""
    meta = read_meta(frozen)
    if meta is None or not isinstance(meta.get("files"), dict):
        return f"the frozen weights that it refers to are missing ({FROZEN}/{frozen.name} beside it)"
    if meta.get("name", digest_of(meta["files"])) != frozen.name:
        return f"{FROZEN}/{frozen.name}/{META} is not what its name says"
    problem = _wrong_size(frozen, meta["files"])
    return f"{FROZEN}/{frozen.name}/{problem}" if problem else None


def whole(folder: StoragePath) -> dict[str, Any] | None:
    """Metadata of a checkpoint whose files are all there at their size; None where it is torn or is no checkpoint."""
    return read_meta(folder) if fault(folder) is None else None


def steps(checkpoints: StoragePath) -> list[StoragePath]:
    """The folders of a run that call themselves checkpoints, the newest first."""
    named = [p for p in places.children(checkpoints) if re.fullmatch(r"step-\d{8,}", p.name) and _is_there(p)]
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def candidates(path: str | StoragePath) -> list[StoragePath]:
    """What a run folder, a checkpoints folder, `latest` or a step folder may stand for, the newest first."""
    given = places.of(path)
    if given.name == LATEST and not given.is_dir():
        given = given.parent
    if places.there(given / META):
        return [given]
    return steps(given) or steps(of_run(given))


def of_run(run: StoragePath) -> StoragePath:
    """Where the checkpoints of a run folder lie: in it, or where train.checkpoints of its recipe says."""
    values = load_yaml(run / "config.yaml") if isinstance(run, Path) and (run / "config.yaml").is_file() else {}
    if root := values.get("train", {}).get("checkpoints"):
        return places.of(root) / values["run"]["name"]
    return run / "checkpoints"


def choose(
    folders: Iterable[StoragePath], fault: Callable[[StoragePath], str | None] = fault
) -> tuple[StoragePath | None, list[str]]:
    """The first folder without a fault, and the faults of those before it, each of which a warning names."""
    faults: list[str] = []
    for folder in folders:
        if (problem := fault(folder)) is None:
            return folder, faults
        log.warning("%s cannot be used: %s. Skipped in favour of the one before it", folder, problem)
        faults.append(f"{folder.name}: {problem}")
    return None, faults


def newest(checkpoints: StoragePath) -> StoragePath | None:
    """The newest whole checkpoint of a run, by names and sizes; says nothing of others."""
    return next((folder for folder in steps(checkpoints) if fault(folder) is None), None)


def resolve(path: str | StoragePath, what: str = "init.from") -> StoragePath:
    """The newest whole checkpoint that `path` stands for, by names and sizes. Raises UserError."""
    found, faults = choose(candidates(path))
    if found is None:
        raise UserError(none_at(path, what, faults))
    return found


def none_at(path: str | StoragePath, what: str, faults: list[str]) -> str:
    """The message where `path` stands for no checkpoint that can be used."""
    if not places.of(path).exists():
        return f"{what}: {path} does not exist; name a run folder or a checkpoint"
    why = faults[0] if faults else f"a folder step-* with a {META} and all of its files"
    return f"{what}: {path} holds no whole checkpoint ({why})"


def unfinished(checkpoints: StoragePath, name: str) -> StoragePath:
    """Where a folder is written: NAME.tmp, but NAME itself in a store."""
    return checkpoints / (name if isinstance(checkpoints, UPath) else f"{name}.tmp")


def begin(checkpoints: StoragePath, name: str) -> StoragePath:
    """An empty folder to write into; leftovers of a crash are removed. Raises OSError where the folder `checkpoints` is
    not there: it may be storage that has gone, and a mount point would take anything."""
    folder = unfinished(checkpoints, name)
    if isinstance(folder, UPath):
        remove(folder)
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def commit(folder: StoragePath, meta: Mapping[str, Any], files: Files) -> StoragePath:
    """Make a written folder a checkpoint: metadata, rename (not in a store), then `latest`."""
    final = folder.with_suffix("")
    _finish(folder, {**meta, "schema": SCHEMA, "files": files}, final)
    _write(final.parent / LATEST, final.name + "\n")
    return final


def commit_frozen(folder: StoragePath, files: Files) -> str:
    """Make a written folder the frozen weights of its content; returns their name."""
    name = frozen_name(folder, files)
    own = {"name": name} if isinstance(folder, UPath) else {}
    _finish(folder, {"files": files, **own}, folder.parent / name)
    return name


def frozen_name(folder: StoragePath, files: Files) -> str:
    """The name that frozen weights written to `folder` get."""
    return folder.name if isinstance(folder, UPath) else digest_of(files)


def digest_of(files: Files) -> str:
    """The name of frozen weights: a hash over the sizes and checksums of their shards."""
    # Tables of contents hold the time and place of writing, so the same weights would get other names.
    return _checksum({name: entry for name, entry in files.items() if not name.endswith(".metadata")})[:16]


def remove(folder: StoragePath) -> None:
    """Remove a folder so that a crash on the way leaves no half of it under its name."""
    if isinstance(folder, UPath):
        for what, recursive in ((folder / META, False), (folder, True)):
            with contextlib.suppress(FileNotFoundError), places.asking(folder):
                folder.fs.rm(what.path, recursive=recursive)
        return
    shutil.rmtree(_rename(folder, ".removed"), ignore_errors=True)


def discard(folder: StoragePath) -> None:
    """Give back the space of what could not be finished, as far as storage lets."""
    if isinstance(folder, UPath):
        with contextlib.suppress(RunError):
            remove(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: StoragePath) -> StoragePath:
    """Rename a damaged checkpoint, or its metadata in a store, so that it counts as none and is there to be looked at;
    returns what has the new name."""
    if isinstance(folder, UPath):
        renamed = folder / f"{META}.damaged"
        with places.asking(folder):
            folder.fs.mv((folder / META).path, renamed.path)
        return renamed
    return _rename(folder, ".damaged")


def _rename(folder: Path, suffix: str) -> Path:
    renamed = folder.with_name(folder.name + suffix)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(folder, renamed)
    return renamed


def _finish(folder: StoragePath, meta: Mapping[str, Any], final: StoragePath) -> None:
    _write(folder / META, json.dumps({**meta, "checksum": _checksum(meta)}, indent=1))
    if not (isinstance(folder, Path) and isinstance(final, Path)):
        return  # in a store that was all
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)
    former = _rename(final, ".removed") if final.exists() else None
    os.replace(folder, final)
    _sync(final.parent)
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)


def _is_there(folder: StoragePath) -> bool:
    """Whether there is such a folder; one in a store has metadata."""
    return folder.is_dir() if isinstance(folder, Path) else places.there(folder / META)


def _write(file: StoragePath, text: str) -> None:
    if isinstance(file, UPath):
        with places.asking(file):
            file.fs.pipe_file(file.path, text.encode())
    else:
        write_atomic(file, text)


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


def _wrong_size(folder: StoragePath, files: Files) -> str | None:
    known = places.sizes(folder)
    for name, entry in files.items():
        try:
            size = known[name] if name in known else places.size(folder / name)
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
    return None
