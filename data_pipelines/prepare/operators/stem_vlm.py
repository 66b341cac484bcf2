"""`stem-vlm`: whether an image is of science, technology, engineering or mathematics, judged by a chat model where the
operator `stem` does not know the source."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.chat_operator import (
    CHAT_NOT_IDENTITY,
    CHAT_OPERATOR_SETTINGS,
    Answers,
    ask_about_records,
)
from data_pipelines.prepare.operator import Annotate, Operator
from data_pipelines.prepare.record_images import image_for_chat, main_image
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.chat.request import ChatRequest

STEM_QUESTION = (
    "Is this image technical material of science, technology, engineering or mathematics, such as a diagram, chart, "
    "plot, table, formula, geometry figure, circuit, molecule, map or medical scan? Photographs of everyday scenes, "
    'art and drawings of people or things are not. Answer as JSON: {"stem": true or false, "reason": "one sentence"}.'
)
STEM_SCHEMA = {
    "type": "object",
    "properties": {"stem": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["stem", "reason"],
    "additionalProperties": False,
}


def _start(settings: Mapping[str, Any]) -> Annotate:
    def questions(record: StoredRecord) -> list[ChatRequest]:
        if record.columns["stem"]["label"] != "unknown":
            return []
        image = image_for_chat(record.image(main_image(record)), settings["max_side"])
        return [ChatRequest((image, STEM_QUESTION), schema=STEM_SCHEMA)]

    def values(record: StoredRecord, answers: Answers) -> Mapping[str, Any]:
        if not answers:
            return {"label": record.columns["stem"]["label"], "reason": None}
        return {"label": "stem" if answers[0]["stem"] else "general", "reason": answers[0]["reason"]}

    return ask_about_records(settings, list(STEM_VLM.columns), questions, values)


STEM_VLM = Operator(
    "stem-vlm",
    1,
    {"label": pa.string(), "reason": pa.string()},
    _start,
    CHAT_OPERATOR_SETTINGS,
    CHAT_NOT_IDENTITY,
    reads=("stem",),
)
"""label: stem or general. It is that of `stem` where that knows the source; reason is then null."""
