"""Checkpoint folders with a few bytes in them, for tests that need no tensors."""

import os
from pathlib import Path

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify


def write(checkpoints: Path, step: int, frozen: str | None = None, metrics: dict[str, float] | None = None) -> Path:
    checkpoints.mkdir(parents=True, exist_ok=True)
    folder = folders.start_folder(checkpoints, folders.step_name(step))
    (folder / "weights").mkdir()
    (folder / "weights" / "__0_0.distcp").write_bytes(b"x" * (100 + step))
    (folder / "weights" / ".metadata").write_bytes(b"m")
    meta = {"step": step, "stage": "stage1", "frozen": frozen, "metrics": metrics or {}}
    return folders.commit_checkpoint(folder, meta, listed(folder))


def write_frozen(checkpoints: Path, content: bytes = b"frozen") -> str:
    (checkpoints / folders.FROZEN).mkdir(parents=True, exist_ok=True)
    folder = folders.start_folder(checkpoints / folders.FROZEN, "new")
    (folder / "__0_0.distcp").write_bytes(content)
    return folders.commit_frozen(folder, listed(folder))


def listed(folder: Path) -> dict[str, dict[str, object]]:
    return {p.relative_to(folder).as_posix(): verify.file_entry(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def names(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir())


def truncate(folder: Path) -> None:
    os.truncate(folder / "weights" / "__0_0.distcp", 5)
