"""Records of a shard folder as requests with known answers: for sample pictures and scores on held-out splits."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.stream.index import groups, picture_names, read_manifest
from data_pipelines.stream.reader import load_picture
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence.geometry import picture_size
from emma_train.sequence.request import Request
from emma_train.sequence.seeds import seed_of


def read_requests(folder: Path, task: str, data: DataConfig, pixels: int, limit: int = 0) -> list[Request]:
    """Requests of one task: every alternative of an i2t record, the first of others; in an order fixed by their keys.

    `limit` takes the first so many (0: all). Raises UserError where the folder is not a shard folder.
    """
    found = sorted(_requests(folder, task, data, pixels), key=lambda request: seed_of(0, 0, request.key, "request"))
    return found[:limit] if limit else found


def _requests(folder: Path, task: str, data: DataConfig, pixels: int) -> Iterator[Request]:
    image = data.und if task == "i2t" else data.gen
    for shard in read_manifest(folder)["shards"]:
        with open(folder / shard["name"], "rb") as file:
            for group in groups(file):
                record = json.loads(group.members["json"])
                files = {name.partition(".")[0]: group.members[name] for name in picture_names(group.members)}
                alternatives = record.get(task, [])
                for number, alternative in enumerate(alternatives if task == "i2t" else alternatives[:1]):
                    target = _load(files[alternative["target"]], image, pixels) if "target" in alternative else None
                    turns = alternative.get("turns", [])
                    yield Request(
                        key=f"{group.key}/{number}",
                        task=task,
                        text=turns[0]["text"] if turns else alternative["text"],
                        pictures=[_load(files[name], image, pixels) for name in alternative.get("images", [])],
                        size=(0, 0) if target is None else (target.shape[0], target.shape[1]),
                        seed=seed_of(data.seed, 0, group.key, "request noise"),
                        truth=turns[1]["text"] if turns else None,
                        target=target,
                        kind=alternative.get("kind", ""),
                        labels=record.get("labels", {}),
                    )


def _load(data: bytes, image: ImageConfig, pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return load_picture(picture, *picture_size(*picture.size, image, pixels)).copy()
