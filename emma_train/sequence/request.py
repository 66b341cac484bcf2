"""Something to be generated: the other end of a sample, laid out by the same functions (sequence/layout.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emma_train.sequence.geometry import to_patches
from emma_train.sequence.image_rules import EMMA_RULES, ImageRules
from emma_train.sequence.layout import IMAGE_MARK, answer_opening, num_text_tokens
from emma_train.sequence.pack import ImageTokens, Sample
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer


@dataclass
class Request:
    """What a model is asked for: a question, a prompt or an instruction, and the images that it shows."""

    key: str
    task: str
    text: str
    images: list[np.ndarray] = field(default_factory=list)
    """uint8 [H, W, 3], sides multiples of 32."""
    size: tuple[int, int] = (0, 0)
    """Height and width in pixels of the image to be made."""
    seed: int = 0
    """Seed of the noise, or of sampled text."""
    truth: str | None = None
    """Right answer of a question, where it is known."""
    target: np.ndarray | None = None
    """uint8 [H, W, 3]: what the image should look like, where it is known."""
    image_names: list[str] = field(default_factory=list)
    target_name: str = ""
    """What the record calls the images and the target."""
    kind: str = ""
    """Kind of question or edit."""
    labels: dict[str, Any] = field(default_factory=dict)
    """Ground truth about the images, for scores."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """The conversation up to the answer, as in a record (role, text); empty: `text` is its only turn."""


Content = str | np.ndarray
"""A part of a message: a text, or an image as uint8 [H, W, 3], sides multiples of 32."""


def conversation_request(key: str, messages: Sequence[tuple[str, Sequence[Content]]], seed: int = 0) -> Request:
    """A question that is asked in messages of (role, texts and images in their order), the last of them the user's.

    An image stands where it stands in its message, as in training where the text has IMAGE_MARK; a text that has the
    letters of the mark keeps them as text. Raises ValueError for an image that is not in a user's message.
    """
    turns, images = [], []
    for role, content in messages:
        parts = [_without_mark(part) if isinstance(part, str) else IMAGE_MARK for part in content]
        if role != "user" and IMAGE_MARK in parts:
            raise ValueError(f"an image in a message of the {role}; EMMA reads images of users alone")
        turns.append({"role": role, "text": "".join(parts)})
        images += [part for part in content if not isinstance(part, str)]
    text = "".join(part for part in messages[-1][1] if isinstance(part, str))
    return Request(key, "i2t", text, images, seed=seed, turns=turns)


def _without_mark(text: str) -> str:
    return text.replace(IMAGE_MARK, IMAGE_MARK.replace(">", " >"))


def num_request_tokens(request: Request, tokenizer: TextTokenizer, side: int, rules: ImageRules = EMMA_RULES) -> int:
    """Tokens of a request with its images, without what is to be generated; `side`: pixels of a visual token."""
    names = [f"img{i}" for i in range(len(request.images))]
    turns = request.turns or [{"role": "user", "text": request.text}]
    alternative = {"turns": turns, "text": request.text, "target": "target"}
    task = TASKS[request.task]
    opening = [] if task.makes_image else answer_opening(tokenizer)
    num_text, _ = num_text_tokens([*task.layout(tokenizer, names, alternative), *opening])
    cells = sum(image.shape[0] * image.shape[1] // side**2 for image in request.images)
    return num_text + rules.tokens_per_cell * cells


def as_sample(
    request: Request,
    tokenizer: TextTokenizer,
    patch: int,
    shuffle: int,
    latents: list[np.ndarray],
    with_text: bool = True,
    with_images: bool = True,
    answer: str | None = None,
) -> Sample:
    """A request as a sample to be packed; its target is blank. `latents` are those of its images, unscaled.

    With an `answer` it is the training sample of question and answer; without, the answer is still to be written.
    """
    side = patch * shuffle
    names = [f"img{i}" for i in range(len(request.images))] if with_images else []
    images = {
        name: ImageTokens((p.shape[0] // side, p.shape[1] // side), to_patches(p, patch, shuffle), latent)
        for name, p, latent in zip(names, request.images, latents, strict=False)
    }
    text, task = request.text if with_text else "", TASKS[request.task]
    turns = request.turns or [{"role": "user", "text": text}]
    if answer is not None:
        turns = [*turns, {"role": "assistant", "text": answer}]
    alternative = {"turns": turns, "text": text, "target": "target"}
    segments = task.layout(tokenizer, names, alternative)
    if not task.makes_image:
        segments += answer_opening(tokenizer) if answer is None else []
    else:
        grid = (request.size[0] // side, request.size[1] // side)
        channels = latents[0].shape[1] if latents else 0
        images["target"] = ImageTokens(grid, None, np.zeros((grid[0] * grid[1], channels), np.float32))
    return Sample(request.key, request.task, segments, images, noise_seed=request.seed)
