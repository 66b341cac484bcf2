"""What a chat model is asked, what it replies, and the protocol that every chat model follows."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REFUSED, TRUNCATED, EMPTY = "refused", "truncated", "empty"
"""Why a reply has no text to use: the model declined; it reached its limit of tokens; it wrote nothing."""
REJECTED, MALFORMED = "rejected", "malformed"
"""Why there is no reply: the server did not accept this request; it answered something that is no chat completion."""
_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF8", "image/gif"),
)


@dataclass(frozen=True)
class ChatRequest:
    """One question: a user's message of texts and images in their order, after an optional system message."""

    content: tuple[str | bytes, ...]
    """Texts, and images as the bytes of JPEG, PNG, GIF or WebP files."""
    system: str = ""
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer; None where any text is an answer."""
    correction: tuple[str, str] | None = None
    """(answer that was not usable, what is wrong with it): the model is asked once more after these two messages."""


@dataclass(frozen=True)
class ChatReply:
    """What a model wrote, or why there is nothing to use."""

    text: str = ""
    failure: str = ""
    """One of the words above; empty where `text` is the whole answer."""
    detail: str = ""


class ChatModel(Protocol):
    """A model that answers questions. It retries what may succeed later, and never makes up an answer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What an answer depends on beside the request: model, temperature and so on. JSON values."""

    def reply(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatReply]]:
        """One reply per request, with the request's number, in the order in which they come. Raises UserError and
        RunError where requests cannot be answered, after all replies that came."""


def media_type(image: bytes) -> str:
    """Media type of an image file by its first bytes. Raises ValueError for other formats."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "image/webp"
    for signature, name in _SIGNATURES:
        if image.startswith(signature):
            return name
    raise ValueError("an image for a chat model is a JPEG, PNG, GIF or WebP file")


def chat_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The request as messages of the OpenAI chat API; images are data URLs."""
    parts: list[dict[str, Any]] = []
    for part in request.content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            url = f"data:{media_type(part)};base64,{base64.b64encode(part).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if request.system:
        messages.insert(0, {"role": "system", "content": request.system})
    if request.correction:
        answer, problem = request.correction
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": problem})
    return messages


def request_key(request: ChatRequest, identity: Mapping[str, Any]) -> str:
    """SHA-256 of a request and of what its answer depends on; images count by their own SHA-256."""
    content = [
        ["text", part] if isinstance(part, str) else ["image", hashlib.sha256(part).hexdigest()]
        for part in request.content
    ]
    described = {
        "identity": dict(identity),
        "system": request.system,
        "content": content,
        "schema": request.schema,
        "correction": request.correction,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
