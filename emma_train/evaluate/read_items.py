"""Reads the official files of benchmarks as items. They come from a folder of the user; none are shipped."""

import json
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem, SourceImage

WISE_FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
GEDIT_TASKS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
GEDIT_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
GEDIT_IMAGES = ("input_image_raw", "input_image")


def geneval_items(data: Path, language: str) -> list[BenchmarkItem]:
    """evaluation_metadata.jsonl: one item a line (tag, prompt, include, perhaps exclude)."""
    path = official_file(data, "evaluation_metadata.jsonl", ("", "prompts"))
    lines = read_json_lines(path)
    return [
        BenchmarkItem(number, f"{number:05d}", _text(path, line, "prompt", number), line)
        for number, line in enumerate(lines)
    ]


def dpg_items(data: Path, language: str) -> list[BenchmarkItem]:
    """The .txt files of the folder of prompts, by name: one item a file."""
    folders = (data / "prompts", data / "dpg_bench" / "prompts", data)
    files = next((files for folder in folders if (files := sorted(folder.glob("*.txt")))), [])
    if not files:
        raise UserError(f"--data {data}: has no prompts/*.txt; name the folder dpg_bench of ELLA's repository")
    if dotted := [file for file in files if "." in file.stem]:
        raise UserError(
            f"{dotted[0]}: DPG-Bench takes a name up to its first dot, so this prompt has no score; rename it"
        )
    return [BenchmarkItem(n, file.stem, _read_text(file).strip()) for n, file in enumerate(files)]


def wise_items(data: Path, language: str) -> list[BenchmarkItem]:
    """Three JSON files, of the first set or the verified one: Prompt, prompt_id, Explanation, Category, Subcategory."""
    folders = ("", "data", "WISE_legacy/data", "data_verified")
    suffix = (
        "_verified" if any((data / folder / f"{WISE_FILES[0]}_verified.json").is_file() for folder in folders) else ""
    )
    entries = []
    for name in WISE_FILES:
        path = official_file(data, f"{name}{suffix}.json", folders)
        entries += [(path, number, entry) for number, entry in enumerate(read_json_list(path))]
    items = []
    for index, (path, number, entry) in enumerate(entries):
        if not isinstance(prompt_id := entry.get("prompt_id"), int):
            raise UserError(f"{path}: entry {number} has no number 'prompt_id'; download the file again")
        items.append(BenchmarkItem(index, str(prompt_id), _text(path, entry, "Prompt", number), entry))
    return items


def geneval2_items(data: Path, language: str) -> list[BenchmarkItem]:
    """geneval2_data.jsonl: one item a line (prompt, atom_count, vqa_list, skills)."""
    path = official_file(data, "geneval2_data.jsonl", ("",))
    return [
        BenchmarkItem(number, f"{number:05d}", _text(path, line, "prompt", number), line)
        for number, line in enumerate(read_json_lines(path))
    ]


def imgedit_items(data: Path, language: str) -> list[BenchmarkItem]:
    """basic_edit.json: key -> id (path of the source), prompt, edit_type. Sources are in `data` or a folder of it."""
    path = official_file(data, "basic_edit.json", ("", "Basic", "Benchmark/Basic"))
    entries = _object(path, "the file", _read_text(path))
    items: list[BenchmarkItem] = []
    root: Path | None = None
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: entry {key} is no JSON object; download the file again")
        name = _text(path, entry, "id", key)
        root = root or _root_of(name, [path.parent, data, *sorted(p for p in data.iterdir() if p.is_dir())])
        source = SourceImage(root / name)
        if not source.path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: entry {key} names {name!r}, outside of the sources; do not trust this file")
        items.append(BenchmarkItem(len(items), key, _text(path, entry, "prompt", key), entry, source, source))
    return items


def _root_of(name: str, folders: list[Path]) -> Path:
    """The folder that has the first source."""
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise UserError(
        f"--data {folders[1]}: has no source {name}; put the folder of original images (Benchmark.tar) there"
    )


def gedit_items(data: Path, language: str) -> list[BenchmarkItem]:
    """The rows of the data set's parquet files, of one language or of both.

    The model edits `input_image_raw`; the judge compares with `input_image`.
    """
    import pyarrow
    import pyarrow.parquet

    files = sorted(data.glob("*.parquet")) or sorted(data.glob("data/*.parquet"))
    if not files:
        raise UserError(f"--data {data}: has no *.parquet; name a copy of the data set stepfun-ai/GEdit-Bench")
    items: list[BenchmarkItem] = []
    for path in files:
        try:
            rows = pyarrow.parquet.read_table(path, columns=list(GEDIT_COLUMNS))
            names = pyarrow.parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: is no table of GEdit-Bench ({str(error)[:100]}); download it again") from None
        if missing := {*GEDIT_COLUMNS, *GEDIT_IMAGES} - set(names):
            raise UserError(f"{path}: has no column {min(missing)}; it is no table of GEdit-Bench")
        for number, row in enumerate(rows.to_pylist()):
            task, row_language = _text(path, row, "task_type", number), _text(path, row, "instruction_language", number)
            if task not in GEDIT_TASKS:
                raise UserError(f"{path}: row {number} has the task {task!r}, which the official scorer leaves out")
            if language in ("", row_language):
                name = f"{task}/{row_language}/{_text(path, row, 'key', number)}"
                images = [SourceImage(path, column, number) for column in GEDIT_IMAGES]
                prompt = _text(path, row, "instruction", number)
                items.append(BenchmarkItem(len(items), name, prompt, row, *images))
    return items


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file that is a list. Raises UserError."""
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is no JSON; download the file again") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path}: is no list of JSON objects; download the file again")
    return values


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


def official_file(data: Path, name: str, folders: tuple[str, ...]) -> Path:
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
