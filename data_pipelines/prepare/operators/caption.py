"""`caption`: a chat model describes the record's image. No tar is rewritten: the caption stands in a column."""

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
from emma_train.sequence.tokens import TextTokenizer

PROMPT = (
    "Describe this image for someone who cannot see it: the main subjects and what they do, their number, colours and "
    "positions, the background, and the style. If there is text in the image, quote it. Say only what is visible. "
    'Answer as JSON: {"caption": "..."}.'
)
CAPTION_SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string", "minLength": 1, "pattern": r"\S"}},
    "required": ["caption"],
    "additionalProperties": False,
}


def _start(settings: Mapping[str, Any]) -> Annotate:
    tokenizer = TextTokenizer(settings["tokenizer"]) if settings["tokenizer"] else None

    def questions(record: StoredRecord) -> list[ChatRequest]:
        image = image_for_chat(record.image(main_image(record)), settings["max_side"])
        return [ChatRequest((image, settings["prompt"]), schema=CAPTION_SCHEMA)]

    def values(record: StoredRecord, answers: Answers) -> Mapping[str, Any]:
        caption = answers[0]["caption"].strip()
        tokens = len(tokenizer.encode_user(caption)) if tokenizer else None
        return {"image": main_image(record), "caption": caption, "tokens": tokens, "model": settings["model"]}

    return ask_about_records(settings, list(CAPTION.columns), questions, values)


CAPTION = Operator(
    "caption",
    1,
    {"image": pa.string(), "caption": pa.string(), "tokens": pa.int32(), "model": pa.string()},
    _start,
    {**CHAT_OPERATOR_SETTINGS, "prompt": PROMPT, "tokenizer": ""},
    CHAT_NOT_IDENTITY,
    files=frozenset(("tokenizer",)),
)
"""image: name of the image that is described. tokens: of the caption, without the chat template, by the setting
`tokenizer` (null without it)."""
