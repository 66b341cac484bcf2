"""Arguments that several commands share: folders of shards, the tokenizer, the number of workers."""

import argparse
import os
from pathlib import Path

from emma_train.errors import UserError, check_range


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="", help="of a Ray cluster; without it, processes of this machine")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    add_workers(parser)
    add_address(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, and do nothing")


def add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", type=float, metavar="N", help="GPUs that Ray gives each task alone; 0.5: two tasks share one (0)"
    )


def check_gpus(arguments: argparse.Namespace, default: float = 0) -> float:
    """The value of --gpus. Raises UserError."""
    if arguments.gpus is None:
        return default
    check_range("--gpus", arguments.gpus, 0, 64)
    return float(arguments.gpus)


def check_workers(arguments: argparse.Namespace) -> int:
    """The value of --workers. Raises UserError."""
    check_range("--workers", arguments.workers, 1, 4096)
    return int(arguments.workers)


def shard_folders(folder: Path) -> list[Path]:
    """The folder itself if it has shards or is a selection, else its subfolders that have shards (the splits).

    Raises UserError if none has.
    """
    from emma_train.storage.urls import check_local

    check_local(folder)
    if any(folder.glob("*.tar")) or any(folder.glob("shard-*.idx.parquet")):
        return [folder]
    subfolders = sorted(path.parent for path in folder.glob("*/*.tar"))
    if not subfolders:
        raise UserError(f"{folder}: no *.tar in it or in its subfolders; give a folder of shards")
    return list(dict.fromkeys(subfolders))


def readable_folders(folder: str) -> dict[str, str]:
    """Folders of shards by name: those of `shard_folders`, or the URL of a remote folder. Raises UserError."""
    from emma_train.storage.urls import check_url, display_url, is_local, local_path

    check_url(folder)
    if not is_local(folder):
        return {display_url(folder): folder}
    return {path.name: str(path) for path in shard_folders(Path(local_path(folder)))}


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that --tokenizer names, or that lies in the folder it names. Raises UserError where there is
    none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--tokenizer {file}: no such file; give a tokenizer.json or its folder")
    return file
