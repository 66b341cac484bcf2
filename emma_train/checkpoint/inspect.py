"""What a person may ask of a checkpoint: what it is, whether it is whole to the byte, a copy that stands alone."""

import shutil
from pathlib import Path
from typing import Any

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.errors import UserError
from emma_train.storage import paths as places
from emma_train.storage.paths import StoragePath


def rows(checkpoint: StoragePath, meta: dict[str, Any]) -> dict[str, str]:
    """A whole checkpoint in words, by what is told."""
    parent, frozen = meta["parent"], folders.frozen_folder(checkpoint, meta)
    own = sum(entry["bytes"] for entry in meta["files"].values())
    shared = 0
    if frozen is not None:
        shared = sum(entry["bytes"] for entry in (folders.read_meta(frozen) or {})["files"].values())
    return {
        "stage": meta["stage"],
        "step": f"{meta['step']} of {meta['config']['train']['steps']}",
        "trainable": ", ".join(f"{group} ({n:,})" for group, n in meta["trainable"].items()),
        "EMA": str(meta["ema_decay"] or "none"),
        "config": meta["config_hash"],
        "from": f"{parent['path']} ({parent['stage'] or 'imported'}, step {parent['step']})" if parent else "the seed",
        "data": ", ".join(f"{k} {v}" for k, v in meta["data"].items()),
        "samples seen": ", ".join(f"{k} {v:,}" for k, v in meta["done"]["seen"].items()),
        "mean since the one before": ", ".join(f"{k} {v:.4f}" for k, v in meta["metrics"].items()) or "not logged",
        "written": f"{meta['time']} by {meta['world_size']} processes",
        "tracker run": meta["tracker_run"] or "none",
        "size": f"{own / 2**20:,.1f} MiB in {len(meta['files'])} files",
        "frozen weights": f"{shared / 2**20:,.1f} MiB in {folders.FROZEN}/{frozen.name}" if frozen else "none",
    }


def faults(path: StoragePath) -> dict[StoragePath, str | None]:
    """What is wrong with each checkpoint that `path` holds; None where every byte of it, and of the frozen weights that
    it refers to, is as it was written. Raises UserError where it holds none."""
    sound: set[StoragePath] = set()
    found = {folder: verify.fault(folder, sound=sound) for folder in folders.candidates(path)}
    if not found:
        raise UserError(folders.none_at(path, "CHECKPOINT", []))
    return found


def flatten(path: StoragePath, out: StoragePath) -> Path:
    """Copy the newest whole checkpoint of `path`, with the frozen weights that it refers to, to a new folder `out` that
    refers to nothing outside. Raises UserError."""
    if not isinstance(out, Path):
        raise UserError(f"--self-contained {out}: is no folder; copy it there from one")
    checkpoint = verify.resolve(path, "CHECKPOINT", folders.PARTS)
    if out.exists():
        raise UserError(f"--self-contained {out}: is there already; name a new folder")
    frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _copy(checkpoint, beside)
        if frozen is not None and checkpoint not in frozen.parents:
            _copy(frozen, beside / folders.FROZEN / frozen.name)
        beside.rename(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"--self-contained {out}: cannot be written ({error})") from None
    if (problem := verify.fault(out)) is not None:
        raise UserError(f"{out}: the copy is not what was copied: {problem}")
    return out


def _copy(folder: StoragePath, to: Path) -> None:
    if isinstance(folder, Path):
        shutil.copytree(folder, to)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    with places.asking(folder):
        folder.fs.get(folder.path, str(to), recursive=True)
