"""Answers are read strictly, kept on disk and counted; nothing is guessed."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from emma_train.chat.answer import BadAnswer, read_answer
from emma_train.chat.answer_cache import AnswerCache
from emma_train.chat.chat import MAX_FAILURES_IN_A_ROW, Chat
from emma_train.chat.endpoint import Endpoint, EndpointSettings
from emma_train.chat.request import ChatReply, ChatRequest, media_type, request_key
from emma_train.errors import RunError, UserError
from tests.chat_server import chat_server
from tests.shards import png

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 10}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}
GOOD = '{"score": 8, "reason": "the hat is red"}'
JUDGE = ChatRequest(("Does it follow?", png(0)), schema=SCHEMA)


class Scripted:
    """A chat model that replies by a list."""

    def __init__(self, *replies: str | ChatReply) -> None:
        self.replies, self.requests = list(replies), []

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": "scripted"}

    def reply(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        self.requests += requests
        replies = [self.replies.pop(0) for _ in requests]
        yield from enumerate(ChatReply(r) if isinstance(r, str) else r for r in replies)


@pytest.mark.parametrize(
    "text",
    [GOOD, f"  {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```\n", f"<think>8? Or 9?</think>\n{GOOD}"],
)
def test_an_object_alone_is_an_answer_and_so_is_one_in_a_fence_or_after_thoughts(text: str) -> None:
    assert read_answer(text, SCHEMA) == {"score": 8, "reason": "the hat is red"}


@pytest.mark.parametrize(
    ("text", "failure", "says"),
    [
        (f"Sure! {GOOD}", "not_json", "Expecting value"),
        (f"{GOOD} {GOOD}", "not_json", "Extra data"),
        ("8", "not_json", "no JSON object but int"),
        (f"[{GOOD}]", "not_json", "no JSON object but list"),
        (GOOD[:-5], "not_json", "Unterminated"),
        ("", "not_json", "Expecting value"),
        ("[" * 100_000, "not_json", "nested"),
        ('{"score": 8, "score": 9, "reason": ""}', "not_json", "twice"),
        ('{"score": NaN, "reason": ""}', "not_json", "NaN"),
        ('{"score": "8", "reason": ""}', "wrong_schema", "score: '8' is not of type 'integer'"),
        ('{"score": 8.5, "reason": ""}', "wrong_schema", "score"),
        ('{"score": true, "reason": ""}', "wrong_schema", "score"),
        ('{"score": 11, "reason": ""}', "wrong_schema", "score: 11 is greater than the maximum of 10"),
        ('{"score": 8}', "wrong_schema", "'reason' is a required property"),
        ('{"score": 8, "reason": "", "extra": 1}', "wrong_schema", "extra"),
    ],
)
def test_anything_else_is_no_answer(text: str, failure: str, says: str) -> None:
    with pytest.raises(BadAnswer, match=".") as error:
        read_answer(text, SCHEMA)
    assert error.value.failure == failure
    assert says in str(error.value)


def test_an_answer_of_a_wrong_form_is_sent_back_once_with_what_is_wrong() -> None:
    model = Scripted('{"score": "8"}', GOOD)
    chat = Chat(model)
    (answer,) = chat.ask([JUDGE])
    assert answer.value == {"score": 8, "reason": "the hat is red"}
    assert model.requests[1].content == JUDGE.content
    assert model.requests[1].correction is not None
    assert model.requests[1].correction[0] == '{"score": "8"}'
    assert chat.counts == {"asked": 2, "corrected": 1, "cached": 0}


def test_failures_are_counted_by_reason_and_have_no_value() -> None:
    model = Scripted(
        "I think eight", "still words", ChatReply(failure="refused", detail="no"), GOOD, ChatReply("{", "truncated")
    )
    chat = Chat(model, corrections=0)
    requests = [ChatRequest((str(i),), schema=SCHEMA) for i in range(5)]
    answers = chat.ask(requests)
    assert [answer.failure for answer in answers] == ["not_json", "not_json", "refused", "", "truncated"]
    assert [answer.value is None for answer in answers] == [True, True, True, False, True]
    assert chat.counts["not_json"] == 2
    assert chat.counts["refused"] == chat.counts["truncated"] == 1


def test_the_same_question_is_asked_once_and_then_comes_from_the_cache(tmp_path: Path) -> None:
    one, other = ChatRequest(("a", png(1)), schema=SCHEMA), ChatRequest(("a", png(2)), schema=SCHEMA)
    first = Chat(Scripted(GOOD, GOOD), AnswerCache(tmp_path / "cache"))
    answers = first.ask([one, other, one])
    assert answers[0] == answers[2]
    assert first.counts == {"asked": 2, "cached": 0, "corrected": 0}
    second = Chat(Scripted(), AnswerCache(tmp_path / "cache"))
    assert second.ask([other, one]) == answers[1::-1]
    assert second.counts == {"cached": 2}


def test_failures_are_not_kept_in_the_cache(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    assert Chat(Scripted("words"), cache, corrections=0).ask([JUDGE])[0].failure == "not_json"
    assert Chat(Scripted(GOOD), cache).ask([JUDGE])[0].value is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "another", "answer": "x"}', '{"key": 1}'])
def test_a_damaged_cached_answer_is_asked_for_again(tmp_path: Path, damage: str) -> None:
    cache = AnswerCache(tmp_path)
    Chat(Scripted(GOOD), cache).ask([JUDGE])
    (file,) = tmp_path.rglob("*.json")
    file.write_text(damage)
    chat = Chat(Scripted(GOOD), cache)
    assert chat.ask([JUDGE])[0].value is not None
    assert chat.counts["asked"] == 1
    assert json.loads(file.read_text())["answer"] == GOOD


def test_what_an_answer_depends_on_is_in_its_key() -> None:
    identity = {"model": "judge", "temperature": 0}
    requests = [
        JUDGE,
        ChatRequest(("Does it follow?", png(1)), schema=SCHEMA),
        ChatRequest((png(0), "Does it follow?"), schema=SCHEMA),
        ChatRequest(("Does it?", png(0)), schema=SCHEMA),
        ChatRequest(JUDGE.content),
        ChatRequest(JUDGE.content, "system", SCHEMA),
        ChatRequest(JUDGE.content, schema=SCHEMA, correction=("a", "b")),
    ]
    keys = [request_key(request, identity) for request in requests]
    keys += [request_key(JUDGE, {**identity, "model": "other"}), request_key(JUDGE, {**identity, "temperature": 1})]
    assert len(set(keys)) == len(keys)
    assert request_key(ChatRequest(("Does it follow?", png(0)), schema=dict(SCHEMA)), identity) == keys[0]


def test_threads_that_write_one_answer_leave_one_complete_file(tmp_path: Path) -> None:
    cache, key, answer = AnswerCache(tmp_path), "ab" * 32, "x" * 100_000
    threads = [threading.Thread(target=lambda: [cache.put(key, answer) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get(key) == answer
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key}.json"]


def test_a_model_that_never_gives_a_usable_answer_ends_the_job() -> None:
    requests = [ChatRequest((str(i),), schema=SCHEMA) for i in range(MAX_FAILURES_IN_A_ROW)]
    with pytest.raises(RunError, match="50 answers in a row cannot be used, the last one for not_json"):
        Chat(Scripted(*["words"] * MAX_FAILURES_IN_A_ROW), corrections=0).ask(requests)


def test_a_cache_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make this folder"):
        AnswerCache(tmp_path / "file" / "cache")


def test_formats_of_images_are_recognised_by_their_bytes() -> None:
    assert media_type(png(0)) == "image/png"
    assert media_type(b"RIFF\0\0\0\0WEBPVP8 ") == "image/webp"
    with pytest.raises(ValueError, match="JPEG, PNG, GIF or WebP"):
        media_type(b"II*\0")


def test_a_killed_job_asks_only_what_it_had_not_asked(tmp_path: Path) -> None:
    """Over HTTP: the first job ends in the middle, because the endpoint goes away."""
    requests = [ChatRequest((str(i),), schema=SCHEMA) for i in range(10)]
    settings = {"model": "judge", "retries": 0, "wait_s": 0.0, "parallel": 1}
    with chat_server(lambda question: GOOD) as server:
        chat = Chat(Endpoint(EndpointSettings(server.url, **settings)), AnswerCache(tmp_path))
        chat.ask(requests[:6])
    with pytest.raises(RunError, match="ConnectError"):
        Chat(Endpoint(EndpointSettings(server.url, **settings)), AnswerCache(tmp_path)).ask(requests)
    with chat_server(lambda question: GOOD) as server:
        chat = Chat(Endpoint(EndpointSettings(server.url, **settings)), AnswerCache(tmp_path))
        assert all(answer.value for answer in chat.ask(requests))
    assert sorted(question.text for question in server.questions) == ["6", "7", "8", "9"]
