"""Something to be generated: the other end of a sample, laid out by the same functions (sequence/layout.py)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emma_train.sequence.geometry import to_patches
from emma_train.sequence.layout import answer_opening
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


def as_sample(
    request: Request,
    tokenizer: TextTokenizer,
    patch: int,
    shuffle: int,
    latents: list[np.ndarray],
    with_text: bool = True,
    with_images: bool = True,
) -> Sample:
    """A request as a sample to be packed; its target is blank. `latents` are those of its images, unscaled."""
    side = patch * shuffle
    names = [f"img{i}" for i in range(len(request.images))] if with_images else []
    images = {
        name: ImageTokens((p.shape[0] // side, p.shape[1] // side), to_patches(p, patch, shuffle), latent)
        for name, p, latent in zip(names, request.images, latents, strict=False)
    }
    text, task = request.text if with_text else "", TASKS[request.task]
    turns = request.turns or [{"role": "user", "text": text}]
    alternative = {"turns": turns, "text": text, "target": "target"}
    segments = task.layout(tokenizer, names, alternative)
    if not task.makes_image:
        segments += answer_opening(tokenizer)
    else:
        grid = (request.size[0] // side, request.size[1] // side)
        channels = latents[0].shape[1] if latents else 0
        images["target"] = ImageTokens(grid, None, np.zeros((grid[0] * grid[1], channels), np.float32))
    return Sample(request.key, request.task, segments, images, noise_seed=request.seed)
