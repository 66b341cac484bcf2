"""OUT/settings.json: what the images of a folder depend on. A run with anything else is refused."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem, reading
from emma_train.storage.files import write_atomic
from emma_train.storage.safetensors_io import read_json

BENCHMARK_SETTINGS = "settings.json"


def checkpoint_digest(meta: Mapping[str, Any]) -> str:
    """Hash of a checkpoint's metadata, which lists the hash of every file."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True, default=str).encode()).hexdigest()


def prompts_digest(items: Iterable[BenchmarkItem]) -> str:
    """Hash of what the items are: names, prompts, official entries and source images. Raises UserError."""
    digest = hashlib.sha256()
    for item in items:
        sources = []
        for source in filter(None, (item.source, item.reference)):
            with reading(source):
                sources.append(hashlib.sha256(source.read()).hexdigest())
        entry = [item.name, item.prompt, dict(item.metadata), sources]
        digest.update(json.dumps(entry, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def texts_digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()


def require_same_settings(out: Path, fixed: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the settings of a new folder; those of one that was begun must be the same.

    `fixed`: what the bytes of the images depend on; `about`: what else is worth knowing. Raises UserError.
    """
    path = out / BENCHMARK_SETTINGS
    if not path.is_file():
        write_atomic(path, json.dumps({"fixed": fixed, "about": about}, indent=1) + "\n")
        return
    begun = read_benchmark_settings(out)
    if change := first_change(begun["fixed"], fixed):
        raise UserError(f"{path}: {change}; go on with what it was begun with, or name another folder with --out")


def read_benchmark_settings(out: Path) -> dict[str, Any]:
    """The settings of a folder that was begun. Raises UserError."""
    path = out / BENCHMARK_SETTINGS
    if not path.is_file():
        raise UserError(
            f"--out {out}: has no {BENCHMARK_SETTINGS}; name a folder that `evaluate --benchmark` has begun"
        )
    settings = read_json(path)
    if not all(isinstance(settings.get(key), dict) for key in ("fixed", "about")):
        raise UserError(f"{path}: is damaged; name another folder with --out")
    return settings


def first_change(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs first, as words; empty where nothing does."""
    for key in [*now, *(begun.keys() - now.keys())]:
        before, after = begun.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict) and (change := first_change(before, after)):
            return f"{key}.{change}"
        if json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
            return f"{key} was {_brief(before)} when this folder was begun, and is {_brief(after)} now"
    return ""


def _brief(value: Any) -> str:
    text = json.dumps(value) if value is not None else "not set"
    return f"{text[:13]}...{text[-1]}" if len(text) > 40 else text


def describe_checkpoint(fixed: Mapping[str, Any]) -> str:
    """The checkpoint that made a folder's images."""
    checkpoint = fixed["checkpoint"]
    weights = "averaged weights" if fixed["ema"] else "weights without average"
    return f"{checkpoint['stage']} step {checkpoint['step']}, {weights}, digest {checkpoint['digest'][:12]}"
