"""The client against a real server on loopback that answers, stalls, fails, refuses and lies."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from emma_train.chat.endpoint import Endpoint, EndpointSettings, retry_after_s
from emma_train.chat.request import ChatReply, ChatRequest
from emma_train.errors import RunError, UserError
from tests.chat_server import ChatServer, Fault, Question, chat_server, completion
from tests.shards import png

KEY = "sk-very-secret-0123456789"
QUESTION = ChatRequest(("What is it?",))


def endpoint(server: ChatServer, **changes: Any) -> Endpoint:
    settings = {"wait_s": 0.01, "retries": 3, "timeout_s": 5, **changes}
    return Endpoint(EndpointSettings(url=server.url, model="judge", **settings))


def replies(client: Endpoint, requests: list[ChatRequest]) -> list[ChatReply]:
    """The replies in the order of the requests."""
    by_number = dict(client.reply(requests))
    return [by_number[number] for number in range(len(requests))]


def test_texts_images_and_schema_arrive_as_they_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    before, after = png(0), png(1)
    schema = {"type": "object", "properties": {"score": {"type": "integer"}}}
    request = ChatRequest(("Before:", before, "After:", after, "Score?"), system="You are strict.", schema=schema)
    with chat_server(lambda question: '{"score": 7}') as server:
        assert replies(endpoint(server), [request]) == [ChatReply('{"score": 7}')]
    (question,) = server.questions
    assert question.path == "/v1/chat/completions"
    assert question.images == [before, after]
    assert question.text == "Before:\nAfter:\nScore?"
    assert [part["type"] for part in question.body["messages"][1]["content"]] == [
        "text", "image_url", "text", "image_url", "text",
    ]  # fmt: skip
    assert question.body["messages"][0] == {"role": "system", "content": "You are strict."}
    assert question.body["response_format"]["json_schema"]["schema"] == schema
    assert (question.body["model"], question.body["temperature"]) == ("judge", 0)
    assert question.headers["Authorization"] == f"Bearer {KEY}"


def test_answers_keep_the_order_of_the_questions_and_no_more_than_parallel_run_at_once() -> None:
    def answer(question: Question) -> str:
        number = int(question.text)
        time.sleep(0.02 * (number % 3))
        return f"answer {number}"

    with chat_server(answer) as server:
        results = replies(endpoint(server, parallel=4), [ChatRequest((str(i),)) for i in range(24)])
    assert [reply.text for reply in results] == [f"answer {i}" for i in range(24)]
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failure_that_may_pass_is_tried_again(status: int) -> None:
    with chat_server(lambda q: Fault(status=status) if q.number < 3 else "yes") as server:
        assert replies(endpoint(server), [QUESTION]) == [ChatReply("yes")]
    assert len(server.questions) == 3


@pytest.mark.seconds
def test_waits_double_and_retry_after_is_honoured() -> None:
    faults = {1: Fault(status=503), 2: Fault(status=503), 3: Fault(status=429, headers={"Retry-After": "1"})}
    with chat_server(lambda q: faults.get(q.number, "yes")) as server:
        assert replies(endpoint(server, wait_s=0.2), [QUESTION]) == [ChatReply("yes")]
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    least = [0.1, 0.2, 1.0]  # jittered between a half and the whole of 0.2 s and of 0.4 s
    assert all(wait >= at_least for wait, at_least in zip(waits, least, strict=True)), waits


def test_retry_after_pauses_all_requests_not_only_the_one_that_failed() -> None:
    with chat_server(lambda q: Fault(status=429, headers={"Retry-After": "0.5"}) if q.number == 1 else "yes") as server:
        replies(endpoint(server, parallel=1), [ChatRequest((str(i),)) for i in range(3)])
    assert server.times[1] - server.times[0] >= 0.5


def test_retry_after_as_a_date_as_nonsense_and_beyond_patience() -> None:
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT", 1445412480 - 30) == 30
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT", 1445412480 + 30) == 0
    assert [retry_after_s(text, 0) for text in ("soon", "nan", "", None)] == [None] * 4
    with (
        chat_server(lambda q: Fault(status=429, headers={"Retry-After": "86400"})) as server,
        pytest.raises(RunError, match="asks for 86400 s of patience"),
    ):
        replies(endpoint(server), [QUESTION])


def test_requests_start_no_more_often_than_the_rate() -> None:
    began = time.monotonic()
    with chat_server(lambda q: "yes") as server:
        replies(endpoint(server, parallel=8, per_minute=600), [ChatRequest((str(i),)) for i in range(6)])
    assert server.times[-1] - began >= 5 * 0.1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=503, body=b'{"error": {"message": "overloaded"}}'), "HTTP 503: overloaded"),
        (Fault(body=completion("yes"), stall_s=1.5), "no answer within 0.3 s"),
        (Fault(body=completion("yes"), trickle_s=0.02), "no answer within 0.3 s"),
        (Fault(body=completion("yes"), cut=True), "RemoteProtocolError"),
    ],
    ids=["overloaded", "stalls", "trickles", "cut off"],
)
def test_an_endpoint_that_never_answers_ends_the_job_in_one_line(fault: Fault, reason: str) -> None:
    began = time.monotonic()
    with chat_server(lambda q: fault) as server, pytest.raises(RunError) as error:
        replies(endpoint(server, retries=1, timeout_s=0.3), [QUESTION])
    assert time.monotonic() - began < 30
    assert reason in str(error.value)
    assert "no answer after 2 tries" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.questions) <= 2


def test_a_port_where_nobody_listens_ends_the_job() -> None:
    with chat_server(lambda q: "yes") as server:
        pass
    with pytest.raises(RunError, match="ConnectError"):
        replies(endpoint(server, retries=1), [QUESTION])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=401, body=f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode()), "set a valid key in $OPENAI"),
        (Fault(status=404, body=b'{"detail": "no such model"}'), "a model of it (judge?)"),
        (Fault(status=308, headers={"Location": "http://elsewhere/v1"}), "name the URL to which it points"),
    ],
    ids=["key", "model", "redirect"],
)
def test_a_wrong_key_model_or_url_ends_the_job_at_once_and_shows_no_key(
    fault: Fault, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with chat_server(lambda q: fault) as server, pytest.raises(UserError) as error:
        replies(endpoint(server), [QUESTION])
    assert message in str(error.value)
    assert len(server.questions) == 1
    assert KEY not in str(error.value) + caplog.text


def test_the_key_is_in_no_log_and_no_repr_while_it_retries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = Fault(status=500, body=f"Authorization: Bearer {KEY}".encode())
    with chat_server(lambda q: echo if q.number < 3 else "yes") as server:
        client = endpoint(server, key_variable="JUDGE_KEY")
        replies(client, [QUESTION])
    assert server.questions[0].headers["Authorization"] == f"Bearer {KEY}"
    assert "HTTP 500" in caplog.text
    assert KEY not in caplog.text + repr(client.settings) + str(client.identity)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (lambda q: Fault(status=400, body=b'{"error": {"message": "image too large"}}'), "rejected"),
        (lambda q: Fault(body=completion(None, refusal="I cannot help with that")), "refused"),
        (lambda q: Fault(body=completion("", finish_reason="content_filter")), "refused"),
        (lambda q: Fault(body=completion('{"score": ', finish_reason="length")), "truncated"),
        (lambda q: Fault(body=b'{"choices": []}'), "empty"),
        (lambda q: Fault(body=completion(None)), "empty"),
        (lambda q: Fault(body=b"<html>Bad gateway</html>"), "malformed"),
        (lambda q: Fault(body=b'{"choices": "none"}'), "malformed"),
        (lambda q: Fault(body=b'{"choices": [{"message": "hello"}]}'), "malformed"),
        (lambda q: Fault(body=b'[["choices"]]'), "malformed"),
        (lambda q: Fault(body=completion(7)), "malformed"),
        (lambda q: Fault(body=b"[" * 100_000), "malformed"),
        (lambda q: Fault(body=b'{"choices": [{"message": {"content": "\xff"}}]}'), "malformed"),
    ],
)
def test_a_reply_that_is_no_answer_is_a_failure_of_its_request(
    answer: Callable[[Question], Fault], failure: str
) -> None:
    """The requests beside it are answered."""
    with chat_server(lambda q: answer(q) if q.text == "bad" else "yes") as server:
        results = replies(endpoint(server), [ChatRequest(("good",)), ChatRequest(("bad",)), ChatRequest(("good",))])
    assert [reply.failure for reply in results] == ["", failure, ""]
    assert results[1].text == ""
    assert results[1].detail


def test_a_body_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emma_train.chat.endpoint.MAX_REPLY_BYTES", 1 << 16)
    with chat_server(lambda q: Fault(body=b" " * (8 << 20))) as server:
        (reply,) = replies(endpoint(server, retries=0), [QUESTION])
    assert reply.failure == "malformed"


def test_one_request_that_cannot_be_answered_cancels_those_that_wait() -> None:
    with chat_server(lambda q: Fault(status=401)) as server, pytest.raises(UserError):
        replies(endpoint(server, parallel=2), [ChatRequest((str(i),)) for i in range(200)])
    assert len(server.questions) < 20


def test_what_was_answered_comes_before_the_error() -> None:
    slow = Fault(body=completion("slow"), stall_s=0.3)
    faults = {"slow": slow, "bad": Fault(status=503)}
    came = []
    with chat_server(lambda q: faults.get(q.text, "yes")) as server, pytest.raises(RunError):
        for number, reply in endpoint(server, parallel=2, retries=0).reply(
            [ChatRequest((t,)) for t in ("slow", "bad")]
        ):
            came.append((number, reply.text))
    assert came == [(0, "slow")]


@pytest.mark.parametrize("url", ["localhost:8000", "http://[broken", "http://", "ftp://host/v1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no URL; give one such as"):
        Endpoint(EndpointSettings(url, "judge"))


def test_a_body_in_a_compression_that_it_does_not_have_is_malformed() -> None:
    with chat_server(lambda q: Fault(body=b"plain", headers={"Content-Encoding": "gzip"})) as server:
        (reply,) = replies(endpoint(server, retries=1), [QUESTION])
    assert reply.failure == "malformed"
