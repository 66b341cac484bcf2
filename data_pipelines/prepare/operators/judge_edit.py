"""`judge-edit`: whether each edit of a record follows its instruction and keeps the rest, judged by a chat model that
sees both images; and, after `faces`, whether the persons are still the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.chat_operator import (
    CHAT_NOT_IDENTITY,
    CHAT_OPERATOR_SETTINGS,
    Answers,
    ask_about_records,
)
from data_pipelines.prepare.face_distance import farthest_face
from data_pipelines.prepare.operator import Annotate, Operator
from data_pipelines.prepare.record_images import image_for_chat
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.chat.request import ChatRequest

EDIT_SCHEMA = {
    "type": "object",
    "properties": {
        "follows": {"type": "integer", "minimum": 1, "maximum": 10},
        "keeps": {"type": "integer", "minimum": 1, "maximum": 10},
        "quality": {"type": "integer", "minimum": 1, "maximum": 10},
        "reason": {"type": "string"},
    },
    "required": ["follows", "keeps", "quality", "reason"],
    "additionalProperties": False,
}
QUESTION = """The first image was edited to give the second. Instruction: {instruction}
Rate from 1 (not at all) to 10 (perfectly):
follows: the second image shows what the instruction asks for;
keeps: everything that the instruction does not mention is as before, persons look like themselves;
quality: the second image has no artefacts and looks natural.
Answer as JSON: {{"follows": 1-10, "keeps": 1-10, "quality": 1-10, "reason": "one sentence"}}."""


def edit_question(before: Sequence[bytes], after: bytes, instruction: str) -> ChatRequest:
    """The judge's question about one edit; images as files that chat models read."""
    content: list[str | bytes] = ["Before:", *before, "After:", after, QUESTION.format(instruction=instruction)]
    return ChatRequest(tuple(content), schema=EDIT_SCHEMA)


def edit_score(answer: Mapping[str, Any]) -> int:
    """The worst of the judge's three ratings, 1 to 10: an edit is as good as what is worst about it."""
    return min(answer["follows"], answer["keeps"], answer["quality"])


def _questions(record: StoredRecord, max_side: int) -> list[ChatRequest]:
    edits = record.json.get("it2i", [])
    if not edits:
        raise ValueError("it has no edit")
    images = {
        name: image_for_chat(record.image(name), max_side)
        for name in {name for edit in edits for name in (*edit["images"], edit["target"])}
    }
    return [edit_question([images[n] for n in e["images"]], images[e["target"]], e["text"]) for e in edits]


def _values(record: StoredRecord, answers: Answers) -> Mapping[str, Any]:
    scores = [edit_score(answer) for answer in answers]
    return {
        "follows": [answer["follows"] for answer in answers],
        "keeps": [answer["keeps"] for answer in answers],
        "quality": [answer["quality"] for answer in answers],
        "reasons": [answer["reason"] for answer in answers],
        "score": min(scores),
        "face_distance": _face_distance(record),
    }


def _face_distance(record: StoredRecord) -> float | None:
    """The largest over the edits of the record; None without faces before an edit, or without the operator `faces`."""
    if "faces" not in record.columns:
        return None
    faces = dict(zip(record.image_names, record.columns["faces"]["embeddings"], strict=True))
    distances = [
        farthest_face([face for name in edit["images"] for face in faces[name]], faces[edit["target"]])
        for edit in record.json["it2i"]
    ]
    known = [distance for distance in distances if distance is not None]
    return max(known) if known else None


def _start(settings: Mapping[str, Any]) -> Annotate:
    names = list(JUDGE_EDIT.columns)
    return ask_about_records(settings, names, lambda record: _questions(record, settings["max_side"]), _values)


JUDGE_EDIT = Operator(
    "judge-edit",
    1,
    {
        "follows": pa.list_(pa.int8()),
        "keeps": pa.list_(pa.int8()),
        "quality": pa.list_(pa.int8()),
        "reasons": pa.list_(pa.string()),
        "score": pa.int8(),
        "face_distance": pa.float32(),
    },
    _start,
    CHAT_OPERATOR_SETTINGS,
    CHAT_NOT_IDENTITY,
    optional_reads=("faces",),
)
"""Lists have one value for each edit of the record. score: the worst rating of all. face_distance: the largest change
of a face, 0 (same) to about 1; the same person below 0.6; infinite where a face is gone; null without faces."""
