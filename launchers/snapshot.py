"""What a job runs: copies of code and recipe in the run folder, so that later edits change nothing."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launchers
from emma_train.errors import UserError

COPIED = ("emma_train", "data_pipelines", "launchers")
COMMIT_FILE = "COMMIT"
"""Beside the copied packages: the commit that they are of."""


@dataclass(frozen=True)
class Snapshot:
    """The folder of one launch: code/, recipe/, changes.patch, launch.json, job.sbatch, starts.json."""

    folder: Path
    recipe: Path
    """The copy of the recipe."""
    commit: str
    """Followed by + where files had changes that no commit holds; empty outside of a checkout."""

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"


def take_snapshot(run: Path, recipe: Path, recipe_files: Sequence[Path], record: Mapping[str, Any]) -> Snapshot:
    """Copy the imported code and the files of a recipe into a new folder of run/launches.

    recipe_files: all files that the recipe reads, itself included. record: more values of launch.json.
    Raises UserError where the folder cannot be written.
    """
    source = Path(launchers.__file__).resolve().parents[1]
    commit, changes = _version(source)
    try:
        folder = _new_folder(run / "launches")
        for package in COPIED:
            skip = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source / package, folder / "code" / package, ignore=skip)
        (folder / "code" / COMMIT_FILE).write_text(commit + "\n")
        copied = _copy_recipe(recipe, recipe_files, folder / "recipe")
        if changes:
            (folder / "changes.patch").write_bytes(changes)
        values = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit, **record}
        (folder / "launch.json").write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"launch: {error.filename or run}: cannot be written ({error.strerror}); set run.root"
        ) from None
    return Snapshot(folder, copied, commit)


def _new_folder(parent: Path) -> Path:
    """A folder named by date and time; a second launch within a second gets another name."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        try:
            folder = parent / (f"{stamp}-{number}" if number else stamp)
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _copy_recipe(recipe: Path, files: Sequence[Path], target: Path) -> Path:
    """Copy files as they lie to each other, so that `extends` and the names of stages still lead to them."""
    resolved = [file.resolve() for file in files]
    top = Path(os.path.commonpath([file.parent for file in resolved]))
    for file in resolved:
        copy = target / file.relative_to(top)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return target / recipe.resolve().relative_to(top)


def _version(source: Path) -> tuple[str, bytes]:
    """Commit of a checkout (empty where it is none), and its changes as a patch."""
    stored = source / COMMIT_FILE
    if stored.is_file():
        return stored.read_text().strip(), b""
    head, changes = _git(source, "rev-parse", "HEAD"), _git(source, "diff", "HEAD", "--binary", "--", *COPIED)
    return head.decode().strip()[:12] + "+" * bool(changes), changes


def _git(folder: Path, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
