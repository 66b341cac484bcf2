"""A record of a shard as an operator sees it: its index rows at once, its bytes when it asks for them."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, BinaryIO

from data_pipelines.shards.images import image_members
from data_pipelines.shards.record import read_record, tags_of
from data_pipelines.shards.record_map import RecordMap
from data_pipelines.shards.tar import crc32, read_group


class StoredRecord:
    """One record. Nothing is read from the shard before it is asked for, so that an operator that needs the index
    alone costs no reading."""

    def __init__(
        self,
        key: str,
        rows: Mapping[str, Mapping[str, Any]],
        shard: BinaryIO,
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        record_map: RecordMap | None = None,
    ) -> None:
        self.key = key
        self.rows = rows
        """Its index row for each task that it has (i2t, t2i, it2i), with the columns of `shards.index.INDEX_SCHEMA`:
        widths and heights of the images as displayed, tags, tokens of each alternative."""
        self.columns = columns or {}
        """Values of the operators that this one reads, by operator and column; `source` has what an importer kept
        of the source (scores, URL, ...)."""
        self._shard = shard
        self._map = record_map

    @cached_property
    def row(self) -> Mapping[str, Any]:
        """The index row of its first task: for what is the same for all (offset, widths, heights, tags)."""
        return next(iter(self.rows.values()))

    @cached_property
    def members(self) -> dict[str, memoryview]:
        """Content of its members by the name after the key: json, img0.webp, ...

        Raises ValueError if the bytes are not those of the index.
        """
        self._shard.seek(self.row["offset"])
        data = self._shard.read(self.row["size"])
        if crc32(data) != self.row["crc32"]:
            raise ValueError("its bytes differ from the index's crc32")
        return read_group(data)

    @cached_property
    def json(self) -> dict[str, Any]:
        """The record as docs/data.md has it, turns with the keys role and text; a plain caption pair as a record with
        i2t and t2i. Raises ValueError."""
        return read_record(self.members, record_map=self._map)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Its JSON as it stands in the shard, with fields that training ignores (provenance, ...); empty if it has
        none. Raises ValueError."""
        fields = json.loads(bytes(self.members.get("json", b"{}")))
        return fields if isinstance(fields, dict) else {}

    @cached_property
    def images(self) -> dict[str, bytes | memoryview]:
        """Encoded images by name (img0, ...), in the order in which the index numbers them."""
        return dict(image_members(self.members))

    @property
    def image_names(self) -> list[str]:
        """Names of its images, in the order in which the index numbers them."""
        return list(self.images)

    def image(self, name: str) -> bytes:
        """An encoded image. `shards.images.open_image` opens it safely. Raises KeyError."""
        return bytes(self.images[name])

    @property
    def main_image(self) -> int:
        """Number of the image that its first alternative makes, or else of its first image."""
        targets = [number for row in self.rows.values() for number in row["target"] if number >= 0]
        return int(targets[0]) if targets else 0

    @property
    def tags(self) -> list[str]:
        """Its tags, sorted."""
        return tags_of({"tags": list(self.row["tags"] or [])})

    def texts(self) -> list[str]:
        """All texts of its alternatives: turns of every role, prompts, instructions; each once, in order."""
        texts = [
            text
            for task in self.rows
            for alternative in self.json.get(task, [])
            for text in ([turn["text"] for turn in alternative.get("turns", [])] or [alternative.get("text", "")])
        ]
        return [text for text in dict.fromkeys(texts) if text.strip()]
