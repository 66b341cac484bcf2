"""How records of foreign tars are read: where their members have captions, turns, or edits.

`emma-data index --caption json:caption` writes the map to map.json beside the shards, and everything that reads their
records takes it from there. A name is a member (`txt`, `src.jpg`), may reach into JSON (`json:caption`, `json[a][0]`),
and may list alternatives (`png,jpg`), of which the first that is present is used.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_pipelines.shards.images import image_name, image_parts
from emma_train.errors import RunError, UserError
from emma_train.sequence.tasks import RECORD_KEYS
from emma_train.storage.files import write_atomic
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.storage_error import StorageError
from emma_train.storage.urls import display_url, join_url

MAP_FILE = "map.json"
MISSING = object()
INSTRUCTIONS = "txt,json:instruction,json:prompt,json:caption"
"""Where an instruction is looked for if the map does not say."""


@dataclass(frozen=True)
class RecordMap:
    """Names of members, by what they are. Turns make i2t; source, target and instruction it2i; a target alone t2i; a
    caption i2t and t2i."""

    caption: str = ""
    turns: str = ""
    source: str = ""
    target: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        kinds = [bool(self.caption), bool(self.turns), bool(self.target)]
        if sum(kinds) != 1 or (self.source and not self.target) or (self.instruction and not self.target):
            raise UserError(
                "a map of foreign records has one of --caption, --turns, and --target (with --source and "
                "--instruction); give one of them"
            )

    def record(self, members: Mapping[str, bytes | memoryview]) -> dict[str, Any]:
        """The record that it makes of members: alternatives of a task, or `captions` of the only image. Raises
        ValueError where a member or key is missing."""
        if self.caption:
            texts = self._value(members, self.caption)
            return {"captions": texts if isinstance(texts, list) else [texts]}
        if self.turns:
            turns = self._value(members, self.turns)
            names = [image_name(part) for part in image_parts(members)]
            return {"i2t": [{"images": names, "turns": json.loads(turns) if isinstance(turns, str) else turns}]}
        text = self._value(members, self.instruction or INSTRUCTIONS)
        texts = [one for one in (text if isinstance(text, list) else [text]) if one]
        target = self._image(members, self.target)
        if not self.source:
            return {"t2i": [{"target": target, "text": one} for one in texts]}
        source = self._image(members, self.source)
        return {"it2i": [{"images": [source], "target": target, "text": one} for one in texts]}

    def converted(self, members: Mapping[str, bytes | memoryview]) -> dict[str, bytes]:
        """Members in the record format that mean the same without a map: JSON with what it makes of them and with its
        other fields, the images, and captions as texts. Raises ValueError where a member or key is missing."""
        fields = json.loads(bytes(members["json"])) if "json" in members else {}
        kept = {name: value for name, value in fields.items() if name not in RECORD_KEYS}
        record = self.record(members)
        captions = [text for text in record.pop("captions", []) if text.strip()]
        texts = {f"c{number:06d}.txt": caption.encode() for number, caption in enumerate(captions)}
        images = {part: bytes(members[part]) for part in image_parts(members)}
        return {"json": json.dumps({**kept, **record}, ensure_ascii=False).encode(), **images, **texts}

    def _value(self, members: Mapping[str, Any], name: str) -> Any:
        value = mapped_value(members, name)
        if value is MISSING:
            raise ValueError(f"it has no {name}; its members: {', '.join(members)}")
        return bytes(value).decode().strip() if isinstance(value, bytes | memoryview) else value

    def _image(self, members: Mapping[str, Any], names: str) -> str:
        part = next((name.strip() for name in names.split(",") if name.strip() in members), None)
        if part is None:
            raise ValueError(f"it has no {names}; its members: {', '.join(members)}")
        return image_name(part)


def mapped_value(values: Mapping[str, Any], path: str) -> Any:
    """The value that a name means in a row or a record's members, or MISSING. Raises ValueError on broken JSON."""
    for name in path.split(","):
        value = _value_of(values, name.strip())
        if value is not MISSING and value is not None:
            return value
    return MISSING


def _value_of(values: Mapping[str, Any], name: str) -> Any:
    if name in values:
        return values[name]
    start, *steps = [step for step in re.split(r"[\[\]:]+", name) if step] or [""]
    if start not in values:
        return MISSING
    value: Any = values[start]
    if isinstance(value, bytes | memoryview | str) and steps:
        try:
            value = json.loads(value if isinstance(value, str) else bytes(value))
        except (ValueError, RecursionError):
            raise ValueError(f"its {start} is no JSON") from None
    for step in steps:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
    return value


def read_map(folder: str | Path, storage: ShardReader | None = None) -> RecordMap | None:
    """The map of a folder of shards; None where its records need none. Raises UserError where it is no map, and
    RunError where storage does not answer."""
    url = join_url(folder, MAP_FILE)
    try:
        values = json.loads((storage or ShardReader()).read(url))
    except StorageError as error:
        if error.missing or error.permanent:
            return None  # a store may answer 403 for a missing file; the manifest says whether there must be one
        raise RunError(str(error)) from None
    except ValueError as error:
        raise UserError(
            f"{display_url(url)}: not valid JSON ({error}); index again with the options of the map"
        ) from None
    return map_of(values, display_url(url))


def map_of(values: Any, where: str) -> RecordMap:
    """A map from its JSON. Raises UserError."""
    names = {field.name for field in fields(RecordMap)}
    if not isinstance(values, dict) or not set(values) <= names or not all(isinstance(v, str) for v in values.values()):
        raise UserError(f"{where}: is no map of records; index again with the options of the map")
    return RecordMap(**values)


def write_map(folder: Path, record_map: RecordMap) -> None:
    """Write the map of a folder of shards."""
    write_atomic(folder / MAP_FILE, json.dumps(asdict(record_map), indent=1) + "\n")
