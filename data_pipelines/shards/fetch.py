"""Copies existing shards unchanged to a local folder: from paths, URLs and the output of commands (pipe:)."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from data_pipelines.shards.excluded import refuse_names
from emma_train.errors import RunError, UserError
from emma_train.storage.files import write_atomic
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import check_local, check_url, display_url

log = logging.getLogger(__name__)
PIPE = "pipe:"
SOURCES_FILE = "sources.json"
"""File in the folder with a hash of each source, so that a second run with other sources is refused."""


def fetch_shards(out: Path, sources: Sequence[str], workers: int) -> dict[str, Any]:
    """Copy every source to `out/shard-000000.tar`, ... in the order given; returns the provenance for the manifest.

    A source is a path, a URL that fsspec opens, or `pipe:COMMAND`, whose output is the shard; braces are expanded as in
    webdataset (`set-{000..099}.tar`). Shards that exist already are kept. Raises UserError, and RunError if a source
    cannot be copied.
    """
    expanded = [one for source in sources for one in _expanded(source)]
    refuse_names(expanded, out)
    for source in expanded:
        if not source.startswith(PIPE):
            check_url(source)
    check_local(out)
    hashes = [hashlib.sha256(source.encode()).hexdigest()[:16] for source in expanded]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give a folder that can be written") from None
    sources_file = out / SOURCES_FILE
    if sources_file.exists() and json.loads(sources_file.read_text()) != hashes:
        raise UserError(f"{out}: holds shards of other sources; give the same ones again, or a new folder")
    if not sources_file.exists() and any(out.glob("*.tar")):
        raise UserError(f"{out}: holds shards that this command did not write; give a new folder")
    write_atomic(sources_file, json.dumps(hashes) + "\n")
    targets = [out / f"shard-{number:06d}.tar" for number in range(len(expanded))]
    missing = [(source, tar) for source, tar in zip(expanded, targets, strict=True) if not tar.exists()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        problems = [problem for problem in pool.map(lambda pair: _fetch_one(*pair), missing) if problem]
    if problems:
        raise RunError(
            f"{len(problems)} of {len(expanded)} shards could not be copied; the first: {problems[0]}; run it again"
        )
    return {"sources": [_display_name(source) for source in expanded]}


def _expanded(source: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except ValueError:  # a brace that is part of the name
        return [source]


def _fetch_one(source: str, tar: Path) -> str | None:
    """Copy one source; returns an error message, or None."""
    part = tar.with_suffix(".tar.part")
    try:
        with open(part, "wb") as file:
            if source.startswith(PIPE):
                # stderr goes to the terminal; it may contain secrets, so no message repeats it.
                code = subprocess.run(source.removeprefix(PIPE), shell=True, stdout=file, check=False).returncode
                if code or not file.seek(0, os.SEEK_END):
                    return f"{_display_name(source)} ended with exit code {code} and wrote {file.tell():,} bytes"
            else:
                with ShardReader().open(source) as remote:
                    shutil.copyfileobj(remote, file, 16 << 20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, tar)
    except StorageError as error:
        return str(error)
    except OSError as error:
        return f"{tar}: {error.strerror}"
    finally:
        part.unlink(missing_ok=True)
    log.info("%s: %s, %.1f MB", tar.name, _display_name(source), tar.stat().st_size / 1e6)
    return None


def _display_name(source: str) -> str:
    """A source without secrets, for messages and manifests: of a command only its program."""
    return f"{PIPE}{source.removeprefix(PIPE).split()[0]} ..." if source.startswith(PIPE) else display_url(source)
