"""Turns of a conversation set, in LLaVA's form and in that of chat APIs, as an alternative of i2t."""

from collections.abc import Sequence
from typing import Any

from data_pipelines.shards.record import ROLES
from data_pipelines.shards.write import Record


def conversation_turns(conversations: object) -> list[dict[str, str]]:
    """Turns with role and text, from a list of {from, value}, {role, text} or {role, content}. Text is kept as it is,
    with each `<image>` in its turn. Raises ValueError."""
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("no list of turns")
    turns = []
    for turn in conversations:
        if not isinstance(turn, dict):
            raise ValueError("a turn is no object")
        role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
        text = next((turn[key] for key in ("text", "value", "content") if turn.get(key) is not None), None)
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise ValueError(f"a turn has the role {role!r}; known are {', '.join(ROLES)}")
        turns.append({"role": ROLES[role.lower()], "text": _content(text)})
    if "user" not in {turn["role"] for turn in turns}:
        raise ValueError("no user turn")
    return turns


def question_turns(question: str, answers: Sequence[str]) -> list[list[dict[str, str]]]:
    """A conversation for each answer to a question."""
    return [[{"role": "user", "text": question}, {"role": "assistant", "text": answer}] for answer in answers]


def conversation_record(turns: list[dict[str, str]], images: Sequence[bytes]) -> tuple[Record, dict[str, bytes]]:
    """The record of one conversation about some images, and these by name."""
    files = {f"img{number}": data for number, data in enumerate(images)}
    return {"i2t": [{"images": list(files), "turns": turns}]}, files


def _content(text: Any) -> str:
    """A turn's text; of chat APIs also a list of parts, of which an image part becomes `<image>`."""
    if isinstance(text, str):
        return text
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        parts = [part.get("text") if part.get("type") == "text" else "<image>" for part in text]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise ValueError("a turn has no text")
