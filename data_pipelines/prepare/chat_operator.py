"""What operators that ask a chat model have in common: settings, and a question for each record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.prepare.operator import READ_ERRORS, Annotate, Columns, Rejected, reason_of
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.chat.chat import Chat
from emma_train.chat.options import CHAT_ACCESS, CHAT_SETTINGS, chat_options, open_chat
from emma_train.chat.request import ChatRequest

CHAT_OPERATOR_SETTINGS: Mapping[str, Any] = {**CHAT_SETTINGS, "max_side": 1024}
"""Images are shown with this longer side at most, in pixels."""
CHAT_NOT_IDENTITY = CHAT_ACCESS

Answers = list[dict[str, Any]]


def ask_about_records(
    settings: Mapping[str, Any],
    columns: Sequence[str],
    questions: Callable[[StoredRecord], Sequence[ChatRequest]],
    values: Callable[[StoredRecord, Answers], Mapping[str, Any]],
) -> Annotate:
    """A function over batches: the questions of all records are asked at once, and `values` makes columns of a record's
    answers. A record is rejected if one of its questions has no usable answer."""
    chat = open_chat(chat_options(settings))

    def annotate(records: Sequence[StoredRecord]) -> Columns:
        asked = [_questions_or_rejected(record, questions) for record in records]
        flat = [request for requests in asked if not isinstance(requests, Rejected) for request in requests]
        answers = iter(answer_values(chat, flat))
        results: list[Mapping[str, Any] | Rejected] = []
        for record, requests in zip(records, asked, strict=True):
            if isinstance(requests, Rejected):
                results.append(requests)
                continue
            of_record = [next(answers) for _ in requests]
            failed = next((answer for answer in of_record if isinstance(answer, Rejected)), None)
            usable = [answer for answer in of_record if not isinstance(answer, Rejected)]
            results.append(failed or values(record, usable))
        return {name: [value if isinstance(value, Rejected) else value[name] for value in results] for name in columns}

    return annotate


def answer_values(chat: Chat, requests: Sequence[ChatRequest]) -> list[dict[str, Any] | Rejected]:
    """The object of each answer, or why there is none. Every request has a schema."""
    return [
        Rejected(f"{answer.failure}: {answer.detail}") if answer.value is None else answer.value
        for answer in chat.ask(requests)
    ]


def _questions_or_rejected(
    record: StoredRecord, questions: Callable[[StoredRecord], Sequence[ChatRequest]]
) -> Sequence[ChatRequest] | Rejected:
    try:
        return questions(record)
    except READ_ERRORS as error:
        return Rejected(reason_of(error))
