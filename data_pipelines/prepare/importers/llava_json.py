"""Conversation sets in LLaVA's JSON (LLaVA-Pretrain, MathV360K, BAGEL's vlm, ...): a file of {image, conversations}."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.conversation import conversation_record, conversation_turns
from data_pipelines.prepare.importers.image_files import ImageFiles, images_beside
from data_pipelines.prepare.importers.item import (
    ImportedSample,
    ImportOptions,
    ImportPart,
    Outcome,
    Reject,
    outcome,
)
from data_pipelines.prepare.importers.json_items import BrokenItem, json_items
from data_pipelines.prepare.importers.source_files import relative_name, source_files

ITEMS_PER_PART = 50_000
TURN_KEYS = ("conversations", "messages")
_NO_COLUMNS = ("id", "image", "images", *TURN_KEYS)
"""Keys of an item that its record holds; the others become columns, where they are texts or numbers."""


def llava_json_parts(source: Path, options: ImportOptions) -> list[ImportPart]:
    """The JSON and JSON-lines files whose items have a conversation, in parts of ITEMS_PER_PART items."""
    parts = []
    for file in source_files(source, (".json", ".jsonl")):
        items = json_items(file)
        if not has_conversation(next(items, None)):
            continue
        name, images = relative_name(file, source), images_beside(file, options.images)
        num_items = 1 + sum(1 for _ in items)
        starts = range(0, num_items, ITEMS_PER_PART)
        reads = (partial(read_range, file, images, first, min(first + ITEMS_PER_PART, num_items)) for first in starts)
        parts += [ImportPart(name, read) for read in reads]
    return parts


def has_conversation(item: object) -> bool:
    """Whether an item of a JSON file is one of a conversation set."""
    return isinstance(item, dict) and any(key in item for key in TURN_KEYS)


def read_range(file: Path, images: ImageFiles, first: int, end: int, start: int) -> Iterator[Outcome]:
    """Outcomes of the items first + start to end of a file."""
    for number, item in enumerate(json_items(file)):
        if number >= end:
            return
        if number < first + start:
            continue
        name = f"{file.name}#{number}"
        if isinstance(item, BrokenItem):
            yield Reject(name, item.reason, 0 if item.ends else 1)
        elif not isinstance(item, dict):
            yield Reject(name, f"{type(item).__name__} where an object should stand")
        else:
            yield outcome(_source_id(item, name), item, partial(_sample, item, name, images))


def _sample(item: dict[str, Any], name: str, images: ImageFiles) -> ImportedSample:
    if item.get("video"):
        raise ValueError("a video, which no task uses")
    turns = conversation_turns(next((item[key] for key in TURN_KEYS if key in item), None))
    record, files = conversation_record(turns, [images.read(path) for path in image_paths(item)])
    scalars = {key: value for key, value in item.items() if isinstance(value, str | int | float)}
    columns = {key: value for key, value in scalars.items() if key not in _NO_COLUMNS}
    return ImportedSample(_source_id(item, name), record, files, columns=columns)


def _source_id(item: dict[str, Any], name: str) -> str:
    return name if item.get("id") is None else str(item["id"])


def image_paths(item: dict[str, Any]) -> list[Any]:
    """Paths of an item's images: `image` or `images`, one or a list."""
    value = item.get("image", item.get("images"))
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
