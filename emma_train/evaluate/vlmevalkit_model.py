"""The adapter of VLMEvalKit (ms-vlmeval 0.0.20). Only vlmevalkit.py imports this file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel

from emma_train.evaluate.harness_model import HarnessModel, Message, MessagePart
from emma_train.generate.settings import TextSettings


class EmmaVLM(BaseModel):
    """EMMA with the dataset's prompts; texts and images keep their order."""

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        path: str,
        device: str = "auto",
        precision: str = "auto",
        ema: bool = True,
        experts: bool = True,
        max_tokens: int = 1024,
    ) -> None:
        """`path`: a run folder, checkpoint or export. Raises UserError."""
        super().__init__()
        self.model = HarnessModel(path, device, precision, ema, experts)
        self.settings = TextSettings(max_tokens=max_tokens)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one question of texts and image files."""
        return self._answer([Message("user", _parts(message))])

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last message. VLMEvalKit's own version drops turns until no error occurs, and so answers
        another question; here an error is one, which VLMEvalKit counts."""
        prepared = [{**message, "content": self.preproc_content(message["content"])} for message in messages]
        return self.chat_inner(prepared, dataset)

    def chat_inner(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last message of a conversation."""
        return self._answer([Message(message["role"], _parts(message["content"])) for message in messages])

    def _answer(self, messages: list[Message]) -> str:
        (answer,) = self.model.answers([self.model.request("question", messages)], self.settings)
        return answer


def _parts(message: Sequence[Mapping[str, Any]]) -> list[MessagePart]:
    return [Path(part["value"]) if part["type"] == "image" else str(part["value"]) for part in message]
