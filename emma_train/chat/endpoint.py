"""A chat model behind an endpoint with OpenAI's chat API: vLLM, SGLang, a hosted model, or EMMA itself."""

import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from emma_train.chat.pace import Pace
from emma_train.chat.request import (
    EMPTY,
    MALFORMED,
    REFUSED,
    REJECTED,
    TRUNCATED,
    ChatReply,
    ChatRequest,
    chat_messages,
)
from emma_train.config.secrets import without_secrets
from emma_train.errors import RunError, UserError
from emma_train.storage.urls import display_url

log = logging.getLogger(__name__)
RETRIED_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504, 529))
ACCESS_STATUSES = frozenset((401, 403))
MAX_REPLY_BYTES = 16 << 20
MAX_WAIT_S = 60.0
"""Longest wait between two tries, unless the server names a longer one."""
MAX_RETRY_AFTER_S = 900.0
"""A server that asks for more patience than this ends the job."""


@dataclass(frozen=True)
class EndpointSettings:
    """How an endpoint is asked."""

    url: str
    """Up to and including `/v1`."""
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    """Of an answer."""
    structured: bool = True
    """Send the JSON schema as `response_format`, which makes vLLM and others write nothing else."""
    parallel: int = 8
    """Requests at once."""
    per_minute: float = 0
    """Requests that start in a minute at most; 0: no limit."""
    timeout_s: float = 300
    """For one try, from the connection to the last byte."""
    retries: int = 6
    """Further tries of a request that may succeed later."""
    wait_s: float = 1.0
    """Before the first further try; doubles each time, jittered."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key is never written anywhere."""


class _Retry(Exception):
    """A try failed and another may succeed. `after_s` is what the server asks for, `failure` what the request counts as
    if no try succeeds; empty where the endpoint is at fault and not the request."""

    def __init__(self, message: str, after_s: float | None = None, failure: str = "") -> None:
        super().__init__(message)
        self.after_s, self.failure = after_s, failure


class Endpoint:
    """Asks `URL/chat/completions`. Timeouts, broken connections, 408, 425, 429 and 5xx are tried again, after
    `Retry-After` where the server sends it, else after waits that double."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Raises UserError if the URL is none."""
        if not _is_url(settings.url):
            shown = without_secrets(settings.url)
            raise UserError(f"--endpoint {shown}: is no URL; give one such as http://localhost:8000/v1")
        self.settings = settings
        self.tries = 0
        """Requests sent, with those that failed."""
        self._name = display_url(settings.url)
        self._pace = Pace(settings.per_minute)
        limits = httpx.Limits(max_connections=settings.parallel, max_keepalive_connections=settings.parallel)
        # Redirects are not followed: they would carry the key to another server.
        self._http = httpx.Client(timeout=settings.timeout_s, limits=limits, follow_redirects=False)

    @property
    def identity(self) -> Mapping[str, Any]:
        s = self.settings
        return {"model": s.model, "temperature": s.temperature, "max_tokens": s.max_tokens}

    def reply(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        """One reply per request, with its number. Raises UserError if URL, key or model is wrong, RunError if no try
        succeeds; what was answered meanwhile comes before."""
        failure: BaseException | None = None
        pool = ThreadPoolExecutor(self.settings.parallel)
        futures = {pool.submit(self._reply, request): number for number, request in enumerate(requests)}
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    yield futures[future], future.result()
                elif failure is None:
                    failure = error
                    for other in futures:
                        other.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def _reply(self, request: ChatRequest) -> ChatReply:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": chat_messages(request),
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }
        if request.schema is not None and self.settings.structured:
            schema = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        for number in range(self.settings.retries + 1):
            self._pace.wait()
            try:
                return self._try(body)
            except _Retry as retry:
                if number < self.settings.retries:
                    self._wait(retry, number)
                elif retry.failure:
                    return ChatReply(failure=retry.failure, detail=str(retry))
                else:
                    tries = f"{number + 1} tries" if number else "one try"
                    raise RunError(
                        f"{self._name}: no answer after {tries} ({retry}); run again when it works: finished shards "
                        f"and cached answers are kept"
                    ) from None
        raise AssertionError("the last try returns or raises")

    def _wait(self, retry: _Retry, number: int) -> None:
        log.info("%s: %s; try %d of %d follows", self._name, retry, number + 2, self.settings.retries + 1)
        if retry.after_s is None:
            # Jittered, so that requests that failed together do not come back together.
            time.sleep(min(MAX_WAIT_S, self.settings.wait_s * 2**number) * random.uniform(0.5, 1))
        elif retry.after_s > MAX_RETRY_AFTER_S:
            raise RunError(f"{self._name}: asks for {retry.after_s:.0f} s of patience ({retry}); run again later")
        else:
            self._pace.pause(retry.after_s)

    def _try(self, body: dict[str, Any]) -> ChatReply:
        """One try. Raises _Retry, UserError."""
        self.tries += 1
        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        url = self.settings.url.rstrip("/") + "/chat/completions"
        try:
            with self._http.stream("POST", url, json=body, headers=headers) as response:
                content = self._content(response)
        except httpx.TimeoutException:
            raise _Retry(f"no answer within {self.settings.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Retry(self._without_key(f"{type(error).__name__}: {error}")) from None
        except httpx.DecodingError as error:
            raise _Retry(f"a body that cannot be decoded: {error}", failure=MALFORMED) from None
        if response.status_code == 200:
            return read_completion(content)
        return self._read_error(response, content)

    def _content(self, response: httpx.Response) -> bytes:
        """The body. A time limit for each read alone would let a server that sends byte by byte go on for ever."""
        end, content = time.monotonic() + self.settings.timeout_s, bytearray()
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > end:
                raise httpx.ReadTimeout("the body takes too long")
            if len(content) > MAX_REPLY_BYTES:
                raise _Retry(f"a body of more than {MAX_REPLY_BYTES >> 20} MiB", failure=MALFORMED)
        return bytes(content)

    def _read_error(self, response: httpx.Response, content: bytes) -> ChatReply:
        """What a status other than 200 means for the request."""
        status = response.status_code
        said = self._without_key(error_message(content))
        detail = f"HTTP {status}" + (f": {said}" if said else "")
        if status in RETRIED_STATUSES or status >= 500:
            raise _Retry(detail, retry_after_s(response.headers.get("Retry-After"), time.time()))
        if status in ACCESS_STATUSES:
            raise UserError(f"{self._name}: {detail}; set a valid key in ${self.settings.key_variable}")
        if status == 404:
            raise UserError(
                f"{self._name}: {detail}; give the URL up to /v1, and a model of it ({self.settings.model}?)"
            )
        if status < 400:
            raise UserError(f"{self._name}: HTTP {status} instead of an answer; name the URL to which it points")
        return ChatReply(failure=REJECTED, detail=detail)

    def _key(self) -> str:
        return os.environ.get(self.settings.key_variable, "").strip()

    def _without_key(self, text: str) -> str:
        key = self._key()
        return without_secrets(text.replace(key, "***") if key else text)


def _is_url(text: str) -> bool:
    try:
        return text.startswith(("http://", "https://")) and bool(urlsplit(text).hostname and httpx.URL(text).host)
    except (httpx.InvalidURL, ValueError):
        return False


def read_completion(content: bytes) -> ChatReply:
    """The reply in the body of a chat completion. Raises _Retry for a body that is none."""
    try:
        choice = json.loads(content)["choices"]
        if choice == []:
            return ChatReply(failure=EMPTY, detail="no choices")
        message, reason = choice[0]["message"], choice[0].get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = content[:80].decode("utf-8", "replace")
        raise _Retry(f"no chat completion: {shown!r}", failure=MALFORMED) from None
    if refusal or reason == "content_filter":
        return ChatReply(failure=REFUSED, detail=str(refusal or "content filter")[:200])
    if reason == "length":
        return ChatReply(failure=TRUNCATED, detail="the answer reached the limit of tokens")
    if text is None or text == "":
        return ChatReply(failure=EMPTY, detail="no text")
    if not isinstance(text, str):
        raise _Retry(f"no chat completion: its content is {type(text).__name__}", failure=MALFORMED)
    return ChatReply(text=text)


def error_message(content: bytes) -> str:
    """What the body of an error says, at most 200 characters of one line."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        error = json.loads(content)
        error = error.get("error", error)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:200]


def retry_after_s(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date; None where it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
