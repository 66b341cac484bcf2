"""EMMA as evaluation harnesses ask it: messages of texts and images in their order, answers and likelihoods out.

The adapters (lmms_eval_model.py, vlmevalkit_model.py) translate between this and their harness; no harness is a
dependency, and each is imported by its own adapter alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.shards.images import display_size, load_image, load_resized
from emma_train.generate.generator import AnswerLikelihood
from emma_train.generate.load import load_generator
from emma_train.generate.settings import TextSettings
from emma_train.generate.text_batches import MAX_SAMPLES, answer_likelihoods, generate_texts
from emma_train.sequence.geometry import image_size
from emma_train.sequence.request import Request, conversation_request

MessagePart = str | Path | Image.Image
"""A text, or an image: a file or what PIL has opened."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    parts: Sequence[MessagePart]


class HarnessModel:
    """A model with the recipe's rule for the size of images."""

    def __init__(
        self,
        path: str,
        device: str = "auto",
        precision: str = "auto",
        use_ema: bool = True,
        use_experts: bool = True,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        """`path`: a run folder, checkpoint or export; `max_samples`: of a batch. Raises UserError."""
        self.generator, recipe, _ = load_generator(path, device, use_ema, precision, use_experts)
        self.image_config, self.multiple = recipe.data.und, recipe.model.autoencoder.pixels
        self.max_samples = max_samples

    def request(self, key: str, messages: Sequence[Message], seed: int = 0) -> Request:
        """A question, laid out as in training. Raises OSError or ValueError for an image that cannot be read or is not
        in a user's message."""
        return conversation_request(
            key,
            [
                (message.role, [part if isinstance(part, str) else self._pixels(part) for part in message.parts])
                for message in messages
            ],
            seed,
        )

    def answers(
        self, requests: Sequence[Request], settings: TextSettings, done: Callable[[int], None] = lambda number: None
    ) -> list[str]:
        """One answer per request. `done` is called with the number of answers after each batch."""
        return generate_texts(self.generator, requests, settings, self.max_samples, done=done)

    def likelihoods(
        self, requests: Sequence[Request], answers: Sequence[str], done: Callable[[int], None] = lambda number: None
    ) -> list[AnswerLikelihood]:
        """How likely an answer to each request is."""
        return answer_likelihoods(self.generator, requests, answers, self.max_samples, done=done)

    def _pixels(self, image: Path | Image.Image) -> np.ndarray:
        """uint8 [H, W, 3], resized as in training."""
        if isinstance(image, Path):
            return load_resized(image.read_bytes(), self.image_config, self.multiple)
        height, width = image_size(*display_size(image), self.image_config, self.multiple)
        return load_image(image, height, width, crop=self.image_config.mode == "crop").copy()
