"""What a user may ask of a checkpoint: what it is, whether every byte is correct, and a copy that is self-contained."""

import shutil
from pathlib import Path
from typing import Any

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.errors import UserError
from emma_train.storage.paths import StoragePath, as_local, storage_of


def summary_rows(checkpoint: StoragePath, meta: dict[str, Any]) -> dict[str, str]:
    """What a valid checkpoint is, in words, by the name of each fact."""
    parent, frozen = meta["parent"], folders.frozen_folder(checkpoint, meta)
    num_bytes = sum(entry["bytes"] for entry in meta["files"].values())
    frozen_bytes = 0
    if frozen is not None:
        frozen_bytes = sum(entry["bytes"] for entry in (folders.read_meta(frozen) or {})["files"].values())
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
        "size": f"{num_bytes / 2**20:,.1f} MiB in {len(meta['files'])} files",
        "frozen weights": f"{frozen_bytes / 2**20:,.1f} MiB in {folders.FROZEN}/{frozen.name}" if frozen else "none",
    }


def verify_all(path: StoragePath) -> dict[StoragePath, str | None]:
    """What is wrong with each checkpoint that `path` holds; None where every byte of it, and of the frozen weights that
    it refers to, is as it was written. Raises UserError where it holds none."""
    verified: set[StoragePath] = set()
    problems = {
        folder: verify.find_damage(folder, verified=verified) or _find_foreign(folder)
        for folder in folders.candidates(path)
    }
    if not problems:
        raise UserError(folders.no_checkpoint_message(path, "CHECKPOINT", []))
    return problems


def _find_foreign(checkpoint: StoragePath) -> str | None:
    """What is wrong with the tables of contents of a checkpoint whose bytes are as they were written."""
    try:
        dcp.tensor_shapes(checkpoint)
    except UserError as error:
        return str(error)
    return None


def copy_self_contained(path: StoragePath, out: StoragePath) -> Path:
    """Copy the newest intact checkpoint of `path`, with the frozen weights that it refers to, to a new local folder
    `out` that refers to nothing outside it. Raises UserError."""
    target = as_local(out)
    if target is None:
        raise UserError(f"--self-contained {out}: is no local folder; name one, and copy it from there")
    checkpoint = verify.find_verified(path, "CHECKPOINT", folders.CHECKPOINT_PARTS)
    if target.exists():
        raise UserError(f"--self-contained {out}: exists already; name a new folder")
    frozen = folders.frozen_folder(checkpoint, folders.read_meta(checkpoint) or {})
    storage = storage_of(checkpoint)
    unfinished = target.with_name(target.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        storage.download(checkpoint, unfinished)
        if frozen is not None and checkpoint not in frozen.parents:
            storage.download(frozen, unfinished / folders.FROZEN / frozen.name)
        unfinished.rename(target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"--self-contained {out}: cannot be written ({error})") from None
    if (problem := verify.find_damage(target)) is not None:
        raise UserError(f"{out}: the copy differs from the original: {problem}")
    return target
