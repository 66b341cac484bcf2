"""Reads records of a shard folder as requests with known answers, for sample images and for scores on held-out data."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipelines.shards.images import image_members, load_resized
from data_pipelines.shards.index import read_columns, read_manifest, shard_url
from data_pipelines.shards.record import read_record
from data_pipelines.shards.record_map import read_map
from data_pipelines.shards.tar import read_group
from emma_train.config.schema import DataConfig
from emma_train.errors import UserError
from emma_train.sequence.layout import num_marks
from emma_train.sequence.request import Request
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.tasks import TASKS
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import parent_url

REQUEST_COLUMNS = ["key", "offset", "size", "target"]
"""Columns of the index that are read."""


def read_requests(folder: str | Path, task: str, data: DataConfig, pixels: int, limit: int = 0) -> list[Request]:
    """Requests of one task, in an order that depends on their keys alone.

    Takes every alternative of a task that makes text, and the first one of a task that makes an image. `limit` reads
    only the first so many (0: all). Raises UserError if the folder is not a shard folder or a record cannot be read.
    """
    storage, key, rows = ShardReader.from_config(data), TASKS[task].record_key, []
    for shard in read_manifest(folder, storage)["shards"]:
        table = read_columns(folder, shard["name"], key, REQUEST_COLUMNS, storage, shard["index_sha256"])
        for row in table.to_pylist():
            for alternative in range(1 if TASKS[task].makes_image else len(row["target"])):
                rows.append((seed_of(0, 0, f"{row['key']}/{alternative}", "request"), alternative, row, shard))
    rows.sort(key=lambda item: item[0])
    return [
        _read_request(folder, shard, row, task, alternative, data, pixels, storage)
        for _, alternative, row, shard in (rows[:limit] if limit else rows)
    ]


def _read_request(
    folder: str | Path,
    shard: dict[str, Any],
    row: dict[str, Any],
    task: str,
    number: int,
    data: DataConfig,
    pixels: int,
    storage: ShardReader,
) -> Request:
    """One alternative (`number`) of a record as a request. Raises UserError."""
    try:
        url = shard_url(folder, shard)
        members = read_group(storage.read_range(url, row["offset"], row["size"], shard["sha256"]))
        record_map = read_map(parent_url(url), storage)
        record, files = read_record(members, record_map=record_map), image_members(members)
        alternative = record[TASKS[task].record_key][number]
        image_config = TASKS[task].image_config(data)
        target = load_resized(files[alternative["target"]], image_config, pixels) if "target" in alternative else None
        names = TASKS[task].shown_images(alternative)
        question, truth = _first_question(alternative.get("turns", []))
        if truth is not None:
            names = _images_of(question, alternative["turns"], names)
        return Request(
            key=f"{row['key']}/{number}",
            task=task,
            text=alternative["text"] if truth is None else question[-1]["text"],
            turns=question,
            images=[load_resized(files[name], image_config, pixels) for name in names],
            size=(0, 0) if target is None else (target.shape[0], target.shape[1]),
            seed=seed_of(data.seed, 0, row["key"], "request noise"),
            truth=truth,
            target=target,
            image_names=list(names),
            target_name=alternative.get("target", ""),
            kind=alternative.get("kind", ""),
            labels=record.get("labels", {}),
        )
    except (StorageError, OSError, KeyError, IndexError, ValueError) as error:
        reason = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: record {row['key']} of {shard['name']} cannot be read ({reason})") from None


def _first_question(turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], str | None]:
    """The turns up to the first user turn that has an answer, and that answer; none of both for a prompt.

    Raises ValueError where no user turn is followed by an assistant turn.
    """
    for index, (turn, following) in enumerate(pairwise(turns)):
        if (turn["role"], following["role"]) == ("user", "assistant"):
            return turns[: index + 1], following["text"]
    if turns:
        raise ValueError("no user turn has an answer")
    return [], None


def _images_of(question: list[dict[str, str]], turns: list[dict[str, str]], names: list[str]) -> list[str]:
    """The images that a question shows, of those of the whole conversation."""
    marks, all_marks = (num_marks([(turn["role"], turn["text"]) for turn in part]) for part in (question, turns))
    return names[:marks] if all_marks else names
