"""Reads the official files of benchmarks as items. They come from a folder of the user; none are shipped."""

import json
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem


def geneval_items(data: Path, language: str) -> list[BenchmarkItem]:
    """evaluation_metadata.jsonl: one item a line (tag, prompt, include, perhaps exclude)."""
    path = _official_file(data, "evaluation_metadata.jsonl", ("", "prompts"))
    lines = read_json_lines(path)
    return [
        BenchmarkItem(number, f"{number:05d}", _text(path, line, "prompt", number), line)
        for number, line in enumerate(lines)
    ]


def dpg_items(data: Path, language: str) -> list[BenchmarkItem]:
    """The .txt files of the folder of prompts, by name: one item a file."""
    folders = (data, data / "prompts", data / "dpg_bench" / "prompts")
    files = next((files for folder in folders if (files := sorted(folder.glob("*.txt")))), [])
    if not files:
        raise UserError(f"--data {data}: has no prompts/*.txt; name the folder dpg_bench of ELLA's repository")
    if dotted := [file for file in files if "." in file.stem]:
        raise UserError(
            f"{dotted[0]}: DPG-Bench takes a name up to its first dot, so this prompt has no score; rename it"
        )
    return [BenchmarkItem(n, file.stem, _read_text(file).strip()) for n, file in enumerate(files)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError."""
    values = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            values.append(_object(path, f"line {number}", line))
    return values


def _object(path: Path, where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: {where} is no JSON; download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is no JSON object; download the file again")
    return value


def _read_text(path: Path) -> str:
    """The text of a file. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None


def _official_file(data: Path, name: str, folders: tuple[str, ...]) -> Path:
    """A file of the benchmark in `data` or in one of its folders. Raises UserError."""
    for folder in folders:
        if (path := data / folder / name).is_file():
            return path
    raise UserError(f"--data {data}: has no {name}; name the folder of the benchmark's official files")


def _text(path: Path, entry: dict[str, Any], key: str, number: int | str) -> str:
    """A text of an official entry. Raises UserError."""
    if not isinstance(value := entry.get(key), str):
        raise UserError(f"{path}: entry {number} has no text {key!r}; download the file again")
    return value


def check_names(items: list[BenchmarkItem], data: Path) -> list[BenchmarkItem]:
    """The items, if their names differ and are safe as paths. Raises UserError."""
    names = set()
    for item in items:
        if item.name in names:
            raise UserError(f"{data}: two items have the name {item.name!r}; download the benchmark again")
        if any(part in ("", ".", "..") for part in item.name.split("/")) or "\\" in item.name or "\0" in item.name:
            raise UserError(f"{data}: {item.name!r} is not usable as a file name; do not trust these files")
        names.add(item.name)
    if not items:
        raise UserError(f"{data}: has no items; download the benchmark again")
    return items
