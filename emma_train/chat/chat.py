"""Asks a chat model many questions: looks into the cache first, reads the answers strictly, counts what failed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emma_train.chat.answer import BadAnswer, read_answer
from emma_train.chat.answer_cache import AnswerCache
from emma_train.chat.request import EMPTY, ChatModel, ChatReply, ChatRequest, request_key
from emma_train.errors import RunError

CORRECTION = (
    "This answer cannot be used: {problem}. Answer the question again, as one JSON object that fits the schema, and "
    "write nothing else."
)
MAX_FAILURES_IN_A_ROW = 50
"""So many answers without a usable one mean that something is wrong with all of them."""


@dataclass(frozen=True)
class ChatAnswer:
    """A usable answer, or why there is none."""

    text: str = ""
    value: dict[str, Any] | None = None
    """The answer's object, where the request has a schema."""
    failure: str = ""
    """Empty for a usable answer."""
    detail: str = ""


class Chat:
    """A model with its cache. An answer that cannot be used is asked for once more, then it is a failure: it is counted
    by its reason and never replaced by a guess."""

    def __init__(self, model: ChatModel, cache: AnswerCache | None = None, corrections: int = 1) -> None:
        """`corrections`: how often an answer of a wrong form is sent back with what is wrong with it."""
        self.model, self.cache, self.corrections = model, cache, corrections
        self.counts: Counter[str] = Counter()
        """asked, cached, corrected, and every kind of failure."""
        self._failures_in_a_row = 0

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """One answer per request, in order. Raises UserError and RunError where none can be answered, and RunError
        after 50 failures without a usable answer."""
        keys = [request_key(request, self.model.identity) for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        answers = {key: answer for key, request in by_key.items() if (answer := self._cached(key, request))}
        self.counts["cached"] += len(answers)
        open_requests = [(key, request, 0) for key, request in by_key.items() if key not in answers]
        while open_requests:
            again = []
            for number, reply in self.model.reply([request for _, request, _ in open_requests]):
                key, request, corrected = open_requests[number]
                self.counts["asked"] += 1
                answer = self._usable(request, reply)
                if corrected < self.corrections and _is_correctable(request, answer):
                    correction = (reply.text, CORRECTION.format(problem=answer.detail))
                    again.append((key, replace(request, correction=correction), corrected + 1))
                    continue
                answers[key] = answer
                if self.cache and not answer.failure:
                    self.cache.put(key, answer.text)
            self.counts["corrected"] += len(again)
            open_requests = again
        self._count_failures(answers.values())
        return [answers[key] for key in keys]

    def _cached(self, key: str, request: ChatRequest) -> ChatAnswer | None:
        text = self.cache.get(key) if self.cache else None
        if text is None:
            return None
        answer = self._usable(request, ChatReply(text=text))
        return None if answer.failure else answer

    def _usable(self, request: ChatRequest, reply: ChatReply) -> ChatAnswer:
        if reply.failure:
            return ChatAnswer(text=reply.text, failure=reply.failure, detail=reply.detail)
        if request.schema is None:
            text = reply.text.strip()
            return ChatAnswer(text=text) if text else ChatAnswer(failure=EMPTY, detail="no text")
        try:
            return ChatAnswer(text=reply.text, value=read_answer(reply.text, request.schema))
        except BadAnswer as error:
            return ChatAnswer(text=reply.text, failure=error.failure, detail=str(error))

    def _count_failures(self, answers: Iterable[ChatAnswer]) -> None:
        for answer in answers:
            if not answer.failure:
                self._failures_in_a_row = 0
                continue
            self.counts[answer.failure] += 1
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise RunError(
                    f"{MAX_FAILURES_IN_A_ROW} answers in a row cannot be used, the last one for {answer.failure} "
                    f"({answer.detail}); is it the right model for this?"
                )


def _is_correctable(request: ChatRequest, answer: ChatAnswer) -> bool:
    """Whether only the form of an answer is wrong."""
    return request.schema is not None and bool(answer.failure) and bool(answer.text.strip())
