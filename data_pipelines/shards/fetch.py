"""Shards of others, brought to a local folder as they are: from paths, URLs, and what a command prints (pipe:)."""

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

from emma_train.errors import RunError, UserError
from emma_train.storage.files import write_atomic
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url

log = logging.getLogger(__name__)
PIPE = "pipe:"
LISTED = "sources.json"
"""In the folder: a hash of each source, so that another list cannot be mixed in when the command is run again."""


def bring(out: Path, sources: Sequence[str], workers: int) -> dict[str, Any]:
    """Copy every source to `out/shard-000000.tar`, ... in the order given; returns the provenance for the manifest.

    A source is a path, a URL that fsspec opens, or `pipe:COMMAND`, whose output is the shard; braces count as in
    webdataset (`set-{000..099}.tar`). What was brought already stays. Raises UserError, and RunError where a source
    does not come.
    """
    expanded = [one for source in sources for one in _expanded(source)]
    hashes = [hashlib.sha256(source.encode()).hexdigest()[:16] for source in expanded]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give a folder that can be written") from None
    listed = out / LISTED
    if listed.exists() and json.loads(listed.read_text()) != hashes:
        raise UserError(f"{out}: holds shards of other sources; give the same ones again, or a new folder")
    if not listed.exists() and any(out.glob("*.tar")):
        raise UserError(f"{out}: holds shards that were not brought by this command; give a new folder")
    write_atomic(listed, json.dumps(hashes) + "\n")
    targets = [out / f"shard-{number:06d}.tar" for number in range(len(expanded))]
    missing = [(source, tar) for source, tar in zip(expanded, targets, strict=True) if not tar.exists()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        problems = [problem for problem in pool.map(lambda pair: _bring_one(*pair), missing) if problem]
    if problems:
        raise RunError(
            f"{len(problems)} of {len(expanded)} shards did not come; the first: {problems[0]}; run it again"
        )
    return {"sources": [_named(source) for source in expanded]}


def _expanded(source: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except ValueError:  # a brace that is none of its own
        return [source]


def _bring_one(source: str, tar: Path) -> str | None:
    """What kept a source from coming, or None."""
    part = tar.with_suffix(".tar.part")
    try:
        with open(part, "wb") as file:
            if source.startswith(PIPE):
                # Its words to stderr go to the terminal as they are: they may hold secrets, so no message repeats them.
                code = subprocess.run(source.removeprefix(PIPE), shell=True, stdout=file, check=False).returncode
                if code or not file.seek(0, os.SEEK_END):
                    return f"{_named(source)} ended with exit code {code} and wrote {file.tell():,} bytes"
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
    log.info("%s: %s, %.1f MB", tar.name, _named(source), tar.stat().st_size / 1e6)
    return None


def _named(source: str) -> str:
    """A source as messages and manifests may show it: of a command its program alone."""
    return f"{PIPE}{source.removeprefix(PIPE).split()[0]} ..." if source.startswith(PIPE) else display_url(source)
