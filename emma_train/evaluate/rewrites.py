"""Rewritten prompts: the model is shown them in the place of the official ones; names, seeds, metadata and questions of
the benchmark stay as they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emma_train.chat.chat import Chat
from emma_train.chat.request import ChatRequest
from emma_train.errors import RunError, UserError
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.evaluate.read_items import read_json_lines, read_json_list
from emma_train.storage.files import write_atomic

REWRITTEN_FILE = "rewritten.jsonl"
"""What a chat model wrote, in the folder of the images."""
TEXT_KEYS = ("rewritten", "prompt", "Prompt")
NAME_KEYS = ("name", "key", "prompt_id")
ANSWER = {
    "type": "object",
    "properties": {"prompt": {"type": "string", "minLength": 1}},
    "required": ["prompt"],
    "additionalProperties": False,
}
REWRITE_PROMPT = (
    "You rewrite prompts for a text-to-image model. Keep every object, number, colour, position and written word of "
    "the prompt. State plainly what it implies, how many of each object there are and where they are. Add a simple "
    'scene that contradicts nothing. One paragraph of at most 80 English words, as JSON: {"prompt": "..."}.'
)
REWRITE_EDIT = (
    "You rewrite instructions for an image editing model that sees the image; you do not. Say the same as one clear "
    "instruction in the same language, name what changes, and ask that all else stays as it is. At most 60 words, as "
    'JSON: {"prompt": "..."}.'
)


def read_rewrites(paths: Sequence[Path], items: Sequence[BenchmarkItem]) -> list[str]:
    """The rewritten prompt of each item, from lines of text, JSONL or JSON lists of objects.

    Objects with a name, key or prompt_id belong to the item of that name; all else belongs to the items in their order,
    of which none may be missing. Raises UserError.
    """
    texts: list[str] = []
    by_name: dict[str, str] = {}
    for path in paths:
        for number, entry in enumerate(_entries(path), 1):
            text, name = _text_of(entry), next((str(entry[key]) for key in NAME_KEYS if key in entry), None)
            if not text:
                raise UserError(f"--rewrite {path}: entry {number} has no text; give one for every prompt")
            if name is not None:
                by_name[name] = text
                continue
            _check_metadata(path, number, entry, items[len(texts)] if len(texts) < len(items) else None)
            texts.append(text)
    if by_name and not texts:
        if missing := [item.name for item in items if item.name not in by_name]:
            raise UserError(f"--rewrite {paths[0]}: has no prompt for {missing[0]} and {len(missing) - 1} others")
        return [by_name[item.name] for item in items]
    if len(texts) != len(items) or by_name:
        raise UserError(
            f"--rewrite {paths[0]}: has {len(texts)} prompts in order for {len(items)} items; give one each"
        )
    return texts


def _entries(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return read_json_list(path)
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    try:
        return [{"prompt": line.strip()} for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--rewrite {path}: cannot be read ({error}); give a file of one prompt a line") from None


def _text_of(entry: dict[str, Any]) -> str:
    text = next((entry[key] for key in TEXT_KEYS if key in entry), "")
    return text.strip() if isinstance(text, str) else ""


def _check_metadata(path: Path, number: int, entry: dict[str, Any], item: BenchmarkItem | None) -> None:
    """Raise UserError where an entry carries official metadata that is not that of its item."""
    official = item.metadata if item else {}
    for key in entry.keys() & official.keys() - set(TEXT_KEYS):
        if entry[key] != official[key]:
            raise UserError(f"--rewrite {path}: entry {number} is not in the official order ({key} differs)")


def ask_for_rewrites(chat: Chat, items: Sequence[BenchmarkItem], out: Path) -> Path:
    """A chat model's rewrites of all prompts, written as REWRITTEN_FILE. Raises RunError where one has none;
    answers are cached, so that the same command asks for the others alone."""
    requests = [
        ChatRequest((item.prompt,), system=REWRITE_EDIT if item.source else REWRITE_PROMPT, schema=ANSWER)
        for item in items
    ]
    answers = chat.ask(requests)
    failed = [(item, answer) for item, answer in zip(items, answers, strict=True) if answer.value is None]
    if failed:
        item, answer = failed[0]
        raise RunError(
            f"{len(failed)} prompts have no rewrite, the first is {item.name} ({answer.failure}: {answer.detail}); run "
            "the same command again: answers are kept"
        )
    lines = [
        json.dumps({"name": item.name, "rewritten": answer.value["prompt"]}, ensure_ascii=False)
        for item, answer in zip(items, answers, strict=True)
        if answer.value is not None
    ]
    write_atomic(out / REWRITTEN_FILE, "\n".join(lines) + "\n")
    return out / REWRITTEN_FILE
