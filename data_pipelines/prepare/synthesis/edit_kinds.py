"""The seven kinds of edits of the paper (§3.3), and the question by which a chat model writes an instruction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emma_train.chat.request import ChatRequest


@dataclass(frozen=True)
class EditKind:
    """One kind of edit."""

    task: str
    """What the instruction asks for, as it is said to the chat model."""
    reverse: str
    """Kind of the edit that undoes it."""


PAPER_EDIT_KINDS: Mapping[str, EditKind] = {
    "add": EditKind("add one object that fits the scene, and say where", "remove"),
    "remove": EditKind("remove one clearly visible object", "add"),
    "replace": EditKind("replace one clearly visible object by another one of about the same size", "replace"),
    "background": EditKind("replace the background by another one; the subject stays as it is", "background"),
    "tone": EditKind("change light, colours or mood of the entire image, such as season or time of day", "tone"),
    "try-on": EditKind("dress the person in another garment, and describe the garment", "try-on"),
    "text": EditKind("change the wording of a text that is visible in the image", "text"),
}
"""Kind -> what it asks for; the field `kind` of an alternative of it2i."""
INSTRUCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "possible": {"type": "boolean"},
        "instruction": {"type": "string"},
        "reverse": {"type": "string"},
    },
    "required": ["possible", "instruction", "reverse"],
    "additionalProperties": False,
}
_QUESTION = """Write an instruction for editing this image: {task}.
The instruction is one short sentence in the imperative that names things as they are seen, so that somebody who has
only the image can carry it out. Write also the reverse instruction, which leads from the edited image back to this one;
it describes what was there before, as if this image had never been seen.
If this edit makes no sense for this image, say that it is not possible and leave both empty.
Answer as JSON: {{"possible": true or false, "instruction": "...", "reverse": "..."}}."""


def instruction_question(image: bytes, kind: str) -> ChatRequest:
    """The question for an instruction of one kind; the image is a file that chat models read."""
    return ChatRequest((image, _QUESTION.format(task=PAPER_EDIT_KINDS[kind].task)), schema=INSTRUCTION_SCHEMA)


def read_instruction(answer: Mapping[str, Any]) -> tuple[str, str]:
    """(instruction, reverse instruction) of an answer. Raises ValueError where the edit is not possible."""
    instruction, reverse = answer["instruction"].strip(), answer["reverse"].strip()
    if not answer["possible"]:
        raise ValueError("the chat model sees no sense in this edit")
    if not instruction or not reverse:
        raise ValueError("the chat model wrote no instruction, or no reverse instruction")
    return instruction, reverse
