"""The folder of a checkpoint: names, metadata, what makes it valid, and how a path that a user gives becomes one.

checkpoints/step-00000100/            a valid checkpoint
    meta.json                         what it is, and size and SHA-256 of every file; written last
    weights/ optimizer/               DCP folders: .metadata and one file of shards per rank
checkpoints/frozen/DIGEST/            weights that cannot change in the stage, stored once; DIGEST is of their shards
checkpoints/step-00000100.tmp/        being written, or left by a crash; never read
checkpoints/step-00000100.removed/    being removed
checkpoints/step-00000100.damaged/    found damaged at a resume, and set aside
checkpoints/latest                    the name of the newest valid one, written last

Folders in an object store cannot be renamed (storage/protocol.py): there step-00000100 is written under its own name
and is a checkpoint once it has its meta.json. Frozen weights have a random name there, which their meta.json repeats,
because their digest is known too late.

A frozen folder may also lie in the checkpoint itself (step-00000100/frozen/DIGEST), which makes it self-contained.
"""

import hashlib
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from emma_train.config.load import load_stored_yaml
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath, as_local, parse_path, storage_of
from emma_train.storage.protocol import META
from emma_train.storage.urls import is_file_name, is_inner_path

log = logging.getLogger(__name__)
LATEST = "latest"
FROZEN = "frozen"
CHECKPOINT_PARTS = ("weights", "optimizer")
SCHEMA = 2
FileEntries = Mapping[str, Mapping[str, Any]]
"""Size and checksum of files by their path below a folder: {"weights/.metadata": {"bytes": 1, "sha256": "..."}}."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: StoragePath) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def read_meta(folder: StoragePath) -> dict[str, Any] | None:
    """Metadata of a folder, whether its files exist or not; None where it has none or its checksum is wrong. Raises
    RunError where it cannot be read for a moment, and UserError where it names files outside the folder, as do all
    functions that call it."""
    try:
        meta = json.loads(storage_of(folder).read(folder / META))
    except ValueError:
        return None
    except OSError as error:
        check_gone(folder / META, error)
        return None
    if not isinstance(meta, dict) or meta.pop("checksum", None) != checksum(meta):
        return None
    _check_names(folder, meta)
    return meta


def _check_names(folder: StoragePath, meta: Mapping[str, Any]) -> None:
    """Raise UserError where metadata names a file or folder outside of its own."""
    files, frozen = meta.get("files"), meta.get("frozen")
    names = [name for name in files if not is_inner_path(name)] if isinstance(files, dict) else []
    if frozen and not is_file_name(frozen):
        names.append(frozen)
    if names:
        raise UserError(f"{folder / META}: names {names[0]!r}, which lies outside the checkpoint; do not trust it")


def check_gone(path: StoragePath, error: OSError) -> None:
    """Return where `error` says that there is no such file. Raise RunError for any other: a file that cannot be read
    for a moment (no permission, a file server that fails) is not damaged."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        raise RunError(
            f"{path} cannot be read on {socket.gethostname()} ({error.strerror or error}): nothing says that it is "
            "damaged; see to it that it can be read, and run the same command again"
        ) from None


def frozen_folder(folder: StoragePath, meta: Mapping[str, Any]) -> StoragePath | None:
    """Folder of the frozen weights that a checkpoint refers to, in it or beside it; None where it refers to none."""
    if not (digest := meta.get("frozen")):
        return None
    inside = folder / FROZEN / digest
    return inside if storage_of(folder).has_folder(inside) else folder.parent / FROZEN / digest


def listed_files(folder: StoragePath, parts: Iterable[str] = CHECKPOINT_PARTS) -> dict[StoragePath, Mapping[str, Any]]:
    """Size and checksum of every file of a valid checkpoint's `parts`, and of the frozen weights it refers to."""
    meta = read_meta(folder) or {}
    prefixes = tuple(f"{part}/" for part in parts)
    files = {folder / name: entry for name, entry in meta["files"].items() if name.startswith(prefixes)}
    if (frozen := frozen_folder(folder, meta)) is not None:
        files |= {frozen / name: entry for name, entry in (read_meta(frozen) or {})["files"].items()}
    return files


def find_problem(folder: StoragePath) -> str | None:
    """Why a folder is not a valid checkpoint, by names and sizes of its files; None where it is one."""
    meta = read_meta(folder)
    if meta is None:
        return f"{META} is missing or torn" if folder.is_dir() else "it does not exist"
    if meta.get("schema") != SCHEMA or not isinstance(meta.get("files"), dict):
        return f"{META} is not of this version (schema {meta.get('schema')}, not {SCHEMA})"
    if folder.name.startswith("step-") and folder.name != step_name(meta.get("step", -1)):
        return f"{META} says step {meta.get('step')}: it is not the checkpoint that its name says"
    if problem := _wrong_size(folder, meta["files"]):
        return problem
    frozen = frozen_folder(folder, meta)
    return None if frozen is None else find_frozen_problem(frozen)


def find_frozen_problem(frozen: StoragePath) -> str | None:
    """The same for a folder of frozen weights."""
    meta = read_meta(frozen)
    if meta is None or not isinstance(meta.get("files"), dict):
        return f"the frozen weights that it refers to are missing ({FROZEN}/{frozen.name} beside it)"
    if meta.get("name", frozen_digest(meta["files"])) != frozen.name:
        return f"{FROZEN}/{frozen.name}/{META} is not what its name says"
    problem = _wrong_size(frozen, meta["files"])
    return f"{FROZEN}/{frozen.name}/{problem}" if problem else None


def read_valid_meta(folder: StoragePath) -> dict[str, Any] | None:
    """Metadata of a checkpoint that is valid by names and sizes; None where it is not."""
    return read_meta(folder) if find_problem(folder) is None else None


def list_steps(checkpoints: StoragePath) -> list[StoragePath]:
    """The folders of a run that have a checkpoint's name, valid or not, the newest first."""
    storage = storage_of(checkpoints)
    folders = [p for p in storage.listdir(checkpoints) if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(filter(storage.has_folder, folders), key=step_of, reverse=True)


def candidates(path: str | StoragePath) -> list[StoragePath]:
    """The checkpoints that a run folder, a checkpoints folder, `latest` or a step folder stands for, newest first."""
    given = parse_path(path)
    if given.name == LATEST and not given.is_dir():
        given = given.parent
    if storage_of(given).exists(given / META):
        return [given]
    return list_steps(given) or list_steps(checkpoints_of_run(given))


def checkpoints_of_run(run: StoragePath) -> StoragePath:
    """The checkpoints folder of a run folder: in it, or where train.checkpoints of its recipe says."""
    local = as_local(run)
    values = load_stored_yaml(local / "config.yaml") if local is not None and (local / "config.yaml").is_file() else {}
    if root := values.get("train", {}).get("checkpoints"):
        return parse_path(root) / values["run"]["name"]
    return run / "checkpoints"


def first_valid(
    folders: Iterable[StoragePath], problem_of: Callable[[StoragePath], str | None] = find_problem
) -> tuple[StoragePath | None, list[str]]:
    """The first folder without a problem, and the problems of those before it, each of which is logged."""
    problems: list[str] = []
    for folder in folders:
        if (problem := problem_of(folder)) is None:
            return folder, problems
        log.warning("%s cannot be used: %s. The checkpoint before it is used instead", folder, problem)
        problems.append(f"{folder.name}: {problem}")
    return None, problems


def newest_checkpoint(checkpoints: StoragePath) -> StoragePath | None:
    """The newest checkpoint of a run that is valid by names and sizes. Logs nothing about others."""
    return next((folder for folder in list_steps(checkpoints) if find_problem(folder) is None), None)


def find_checkpoint(path: str | StoragePath, field: str = "init.from") -> StoragePath:
    """The newest checkpoint that `path` stands for, valid by names and sizes. Raises UserError, which names `field`."""
    checkpoint, problems = first_valid(candidates(path))
    if checkpoint is None:
        raise UserError(no_checkpoint_message(path, field, problems))
    return checkpoint


def no_checkpoint_message(path: str | StoragePath, field: str, problems: list[str]) -> str:
    """The message where `path` stands for no usable checkpoint."""
    if not parse_path(path).exists():
        return f"{field}: {path} does not exist; name a run folder or a checkpoint"
    reason = problems[0] if problems else f"a folder step-* with a {META} and all of its files"
    return f"{field}: {path} holds no valid checkpoint ({reason})"


def start_folder(checkpoints: StoragePath, name: str) -> StoragePath:
    """An empty folder to write a checkpoint or frozen weights of that name into."""
    written: StoragePath = storage_of(checkpoints).start_folder(checkpoints / name)
    return written


def commit_checkpoint(written: StoragePath, meta: Mapping[str, Any], files: FileEntries) -> StoragePath:
    """Make a written folder a checkpoint: metadata, its final name, then `latest`."""
    folder = written.with_suffix("")
    storage = storage_of(folder)
    storage.publish(written, folder, with_checksum({**meta, "schema": SCHEMA, "files": files}))
    storage.write(folder.parent / LATEST, f"{folder.name}\n".encode())
    return folder


def commit_frozen(written: StoragePath, files: FileEntries) -> str:
    """Publish a written folder of frozen weights. Returns its name."""
    storage, name = storage_of(written), frozen_name(written, files)
    meta = {"files": files} if storage.can_rename else {"files": files, "name": name}
    storage.publish(written, written.parent / name, with_checksum(meta))
    return name


def frozen_name(written: StoragePath, files: FileEntries) -> str:
    """The name that a written folder of frozen weights gets."""
    return frozen_digest(files) if storage_of(written).can_rename else written.name


def frozen_digest(files: FileEntries) -> str:
    """A hash of the sizes and checksums of shards, which names frozen weights by their content."""
    # Tables of contents hold the time and path of writing, so the same weights would get other names.
    return checksum({name: entry for name, entry in files.items() if not name.endswith(".metadata")})[:16]


def with_checksum(meta: Mapping[str, Any]) -> str:
    """Metadata as JSON, with its own checksum."""
    return json.dumps({**meta, "checksum": checksum(meta)}, indent=1)


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of metadata."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _wrong_size(folder: StoragePath, files: FileEntries) -> str | None:
    storage = storage_of(folder)
    sizes = storage.listed_sizes(folder)
    for name, entry in files.items():
        try:
            size = sizes[name] if name in sizes else storage.size(folder / name)
        except OSError as error:
            check_gone(folder / name, error)
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
    return None
