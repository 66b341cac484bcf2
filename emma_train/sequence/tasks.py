"""The tasks: what each one shows, what it makes, how it is laid out, and which loss it has.

A task is data. Everything that differs between tasks is a field here, and everything else iterates over TASKS, so a new
task needs a field in config.schema.MixConfig and an entry in TASKS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence import layout
from emma_train.sequence.layout import ImageRole, Segment
from emma_train.sequence.tokens import TextTokenizer

Alternative = Mapping[str, Any]
"""One alternative of a record (docs/data.md): `turns` of a task that makes text; `text` and `target` of one that makes
an image; `images` that it shows."""
Layout = Callable[[TextTokenizer, Sequence[str], Alternative], list[Segment]]
"""(tokenizer, names of the images to show, alternative) -> segments."""


@dataclass(frozen=True)
class Task:
    """What the project knows about a task."""

    name: str
    """Field of MixConfig and suffix of the metrics loss/NAME and samples/NAME."""
    title: str
    """What it does, for charts."""
    heading: str
    """What it makes, over samples in the report."""
    color: str
    """Color in charts: a CSS class of report/page.py."""
    loss: Literal["text", "flow"]
    """text: next-token prediction of its answers. flow: flow matching of its target image."""
    images: Literal["und", "gen"]
    """Section of the recipe's data that says how its images are resized."""
    condition: ImageRole | None
    """Role of the images that it shows; None if it shows none."""
    layout: Layout
    """Segments of one sample."""
    typical_text: tuple[int, int]
    """(text tokens, supervised ones among them) of a mean sample; `plan` assumes them where it has no index."""
    records: str = ""
    """Task whose alternatives and index rows it uses; its own where empty."""
    shows_target: bool = False
    """Whether it shows its target image instead of the alternative's `images`."""
    fixed_text: bool = False
    """Whether the text is the same in every sample, whatever the alternative says."""

    @property
    def makes_image(self) -> bool:
        """Whether it makes an image; the others make text."""
        return self.loss == "flow"

    @property
    def record_key(self) -> str:
        """Key of its alternatives in a record, and its name in an index."""
        return self.records or self.name

    def image_config(self, data: DataConfig) -> ImageConfig:
        """How its images are resized."""
        return data.und if self.images == "und" else data.gen

    def shown_images(self, alternative: Alternative) -> list[str]:
        """Names of the images that it shows, before any condition dropout."""
        return [alternative["target"]] if self.shows_target else list(alternative.get("images", []))


def _question_and_answers(tokenizer: TextTokenizer, images: Sequence[str], alternative: Alternative) -> list[Segment]:
    turns = [(turn["role"], turn["text"]) for turn in alternative["turns"]]
    return layout.understanding(tokenizer, images, turns)


def _text_to_image(tokenizer: TextTokenizer, images: Sequence[str], alternative: Alternative) -> list[Segment]:
    return layout.generation(tokenizer, images, alternative["text"], alternative["target"])


RECONSTRUCTION_PROMPT = "Describe the image in detail."
"""Ours: one fixed prompt, where RecA's code draws one of a list."""


def _reconstruction(tokenizer: TextTokenizer, images: Sequence[str], alternative: Alternative) -> list[Segment]:
    # Its own latent in the condition would give the target away.
    prompt, target = RECONSTRUCTION_PROMPT, alternative["target"]
    return layout.generation(tokenizer, images, prompt, target, ImageRole.UND, semantic_only=True)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="i2t",
            title="understanding (i2t)",
            heading="Answers about images",
            color="c-blue",
            loss="text",
            images="und",
            condition=ImageRole.UND,
            layout=_question_and_answers,
            typical_text=(160, 128),
        ),
        Task(
            name="t2i",
            title="generation (t2i)",
            heading="Images from text",
            color="c-red",
            loss="flow",
            images="gen",
            condition=None,
            layout=_text_to_image,
            typical_text=(96, 0),
        ),
        Task(
            name="it2i",
            title="editing (it2i)",
            heading="Edited images",
            color="c-green",
            loss="flow",
            images="gen",
            condition=ImageRole.REFERENCE,
            layout=_text_to_image,
            typical_text=(64, 0),
        ),
        # Every target of a t2i alternative can be reconstructed, so no other records and no new index are needed.
        Task(
            name="recon",
            title="reconstruction (recon)",
            heading="Reconstructed images",
            color="c-pink",
            loss="flow",
            images="gen",
            condition=ImageRole.UND,
            layout=_reconstruction,
            typical_text=(18, 0),
            records="t2i",
            shows_target=True,
            fixed_text=True,
        ),
    )
}
"""Every task, in the order of MixConfig."""
RECORD_KEYS = tuple(dict.fromkeys(task.record_key for task in TASKS.values()))
"""Tasks that have alternatives and index rows of their own."""


def tasks_of_loss(loss: str) -> tuple[str, ...]:
    """Names of the tasks with a loss of that kind."""
    return tuple(name for name, task in TASKS.items() if task.loss == loss)


def fixed_text_tokens(task: Task, tokenizer: TextTokenizer) -> int:
    """Text tokens of every sample of a task whose text is fixed; 0 where they depend on the record."""
    if not task.fixed_text:
        return 0
    alternative = {"target": "target"}
    return layout.num_text_tokens(task.layout(tokenizer, task.shown_images(alternative), alternative))[0]
