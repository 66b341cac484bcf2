"""`--map FIELD=NAME`: where a source of another form has the fields of a record, and the sample that they make.

A NAME is a column, a key or a tar member. It may reach into JSON and lists, `json[caption]`, `json[turns][0]`,
`json:caption`, and name alternatives, `png,jpg`, of which the first that is present is used.
"""

import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.prepare.importers.captions import caption_texts
from data_pipelines.prepare.importers.conversation import conversation_record, conversation_turns, question_turns
from data_pipelines.prepare.importers.hub_image import image_bytes
from data_pipelines.prepare.importers.item import ImportedSample, clean_text
from data_pipelines.prepare.importers.omniedit import edit_record
from data_pipelines.shards.record_map import MISSING, mapped_value
from emma_train.errors import UserError

MAP_FIELDS = (
    *("id", "image", "caption", "turns", "question", "answer"),
    *("source", "target", "instruction", "kind", "text"),
)
IMAGE_FIELDS = ("image", "source", "target")


def check_map(fields: Mapping[str, str]) -> None:
    """Raise UserError where a map has a field that records do not have, or too few to make a sample."""
    if unknown := [name for name in fields if name not in MAP_FIELDS]:
        raise UserError(f"--map {unknown[0]}=...: no such field; there are {', '.join(MAP_FIELDS)}")
    sets = ({"caption", "image"}, {"turns"}, {"question", "answer"}, {"target", "instruction"}, {"text"})
    if not any(needed <= set(fields) for needed in sets):
        raise UserError(
            f"--map {' '.join(f'{k}={v}' for k, v in fields.items()) or '(none)'}: makes no sample; give image and "
            "caption, turns, question and answer, or source, target and instruction"
        )


def mapped_sample(values: Mapping[str, Any], fields: Mapping[str, str], name: str) -> ImportedSample:
    """The sample that a map makes of a row or of a record's members. Raises ValueError."""

    def get(field: str) -> Any:
        value = mapped_value(values, fields[field])
        if value is MISSING:
            raise ValueError(f"no {fields[field]}; it has {', '.join(values)}")
        return _text(value) if field not in IMAGE_FIELDS else value

    source_id = str(get("id")) if "id" in fields else name
    if "target" in fields:
        kind = clean_text(get("kind")) if "kind" in fields else ""
        references = _images(get("source"), "source") if "source" in fields else []
        return _made_image(source_id, references, _images(get("target"), "target"), get("instruction"), kind)
    if "text" in fields:  # an answer to nothing: language modelling in the chat template
        answer = {"role": "assistant", "text": clean_text(get("text"))}
        return ImportedSample(source_id, {"i2t": [{"images": [], "turns": [answer]}]}, {})
    image = mapped_value(values, fields["image"]) if "image" in fields else MISSING
    images = [] if image is MISSING else _images(image, "image")
    if "turns" in fields:
        return ImportedSample(source_id, *conversation_record(conversation_turns(_parsed(get("turns"))), images))
    files = {f"img{i}": data for i, data in enumerate(images)}
    if "question" in fields:
        turns = question_turns(clean_text(get("question")), caption_texts(get("answer")))
        return ImportedSample(source_id, {"i2t": [{"images": list(files), "turns": t} for t in turns]}, files)
    if len(files) != 1:
        raise ValueError(f"{len(files)} images for a caption; it has {', '.join(values)}")
    return ImportedSample(source_id, {}, files, caption_texts(get("caption")))


def _made_image(name: str, references: list[bytes], targets: list[bytes], text: Any, kind: str) -> ImportedSample:
    """An edit, or without reference images a prompt."""
    if len(targets) != 1:
        raise ValueError(f"{len(targets)} target images")
    files = {f"img{i}": data for i, data in enumerate([*references, *targets])}
    texts, names = list(caption_texts(text)), list(files)
    if not references:
        return ImportedSample(name, {"t2i": [{"target": names[-1], "text": text} for text in texts]}, files)
    return ImportedSample(name, edit_record(texts, names[:-1], names[-1], kind), files)


def _text(value: Any) -> Any:
    """A value whose bytes are text."""
    return bytes(value).decode() if isinstance(value, bytes | memoryview) else value


def _parsed(value: Any) -> Any:
    """A value, or that of its JSON where it is a text."""
    if isinstance(value, bytes | str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("its turns are no JSON") from None
    return value


def _images(value: Any, name: str) -> list[bytes]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [image_bytes(one, name) for one in values]
