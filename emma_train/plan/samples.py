"""Tokens of the mean sample of a task: measured on index rows of the sources where there are some, else assumed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emma_train.config.mix import samples_per_task, task_shares
from emma_train.config.schema import ImageConfig, PhaseConfig, Recipe, SourceConfig
from emma_train.sequence.geometry import image_size, is_suitable
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.tasks import TASKS, Task

ASSUMED_NATIVE_TOKENS = 1024
"""Mean visual tokens of an image at native resolution (photographs some 300, scanned pages some 3,600)."""
ASSUMED_BYTES_PER_PIXEL = 0.25
"""Of images in shards, at the size at which they are trained on: JPEG and WebP of usual quality."""
ASSUMED_BYTES_PER_TOKEN = 4.0
FILLED = 0.98
"""Share of the packs' tokens that are filled, if data.samples_per_step is 0."""

ReadIndexRows = Callable[[SourceConfig, str], list[dict[str, Any]] | None]
"""Index rows of a source that have a task, by its name, as in data_pipelines/shards/index.py, but with `text_tokens` as
the recipe lays them out; None where no index is on disk."""


@dataclass(frozen=True)
class MeanSample:
    """A mean sample of a task, in tokens."""

    text: float
    supervised: float
    seen: float
    """Visual tokens of images that the vision encoder sees: to understand, or as a reference."""
    images_seen: float
    """Number of these images."""
    made: float
    """Visual tokens of the target image."""
    measured: bool
    """Measured on index rows, not assumed."""
    unsuitable: float = 0.0
    """Share of samples with an image below min_side or beyond max_aspect: others are trained on instead."""
    enlarged: float = 0.0
    """Share of samples with an image that is enlarged to more than twice its pixels."""
    read_bytes: float = 0.0
    """Bytes of its record in the shard."""
    tokens_per_cell: int = 1
    """LLM tokens of each visual token that is seen."""

    @property
    def shown(self) -> float:
        """LLM tokens of the images that it shows."""
        return self.tokens_per_cell * self.seen

    @property
    def tokens(self) -> float:
        return self.text + self.shown + self.made


@dataclass(frozen=True)
class StepLoad:
    """Samples and tokens of one optimizer step of a phase."""

    phase: PhaseConfig
    samples: dict[str, int]
    """Samples a step, by task."""
    means: dict[str, MeanSample]

    def total(self, value: Callable[[MeanSample], float], *tasks: str) -> float:
        """Sum of a value over the step's samples, of all tasks or some."""
        return sum(n * value(self.means[task]) for task, n in self.samples.items() if not tasks or task in tasks)

    @property
    def tokens(self) -> float:
        return self.total(lambda s: s.tokens)


def step_load(recipe: Recipe, phase: PhaseConfig, read_index_rows: ReadIndexRows | None = None) -> StepLoad:
    """The load of a step of a phase; without `read_index_rows`, sizes of samples are assumed."""
    shares = task_shares(phase.mix)
    total = sum(shares.values())
    means = {task: mean_sample(recipe, phase.sources, TASKS[task], read_index_rows) for task in shares}
    if recipe.data.samples_per_step:
        return StepLoad(phase, samples_per_task(phase.mix, recipe.data.samples_per_step), means)
    # Packs are filled. mix_by samples: a unit of the mix counts its tokens; mix_by tokens: each task has its share.
    room = FILLED * recipe.data.slots * recipe.data.pack_tokens
    unit = sum(share * means[task].tokens for task, share in shares.items())
    if recipe.data.mix_by == "tokens":
        return StepLoad(phase, {t: round(room * share / total / means[t].tokens) for t, share in shares.items()}, means)
    return StepLoad(phase, {task: share * int(room // unit) for task, share in shares.items()}, means)


def mean_sample(
    recipe: Recipe, sources: list[SourceConfig], task: Task, read_index_rows: ReadIndexRows | None = None
) -> MeanSample:
    """Mean sample of a task: measured if all sources that have the task can be read, else assumed."""
    image_config, per_cell = task.image_config(recipe.data), image_rules(recipe.model).tokens_per_cell
    pixels = recipe.model.autoencoder.pixels
    of_task = [source for source in sources if not source.tasks or task.name in source.tasks]
    rows = [read_index_rows(source, task.name) if read_index_rows else None for source in of_task]
    if any(rows) and None not in rows:
        total, sums = 0.0, [0.0] * 8
        for source, source_rows in zip(of_task, rows, strict=True):
            # A source with a weight counts as its weight, whatever the number of its rows.
            share = source.weight / len(source_rows) if source.weight and source_rows else 1.0
            for row in source_rows or ():
                values = _row_means(row, task, image_config, pixels)
                sums = [so_far + share * value for so_far, value in zip(sums, values, strict=True)]
                total += share
        text, supervised, seen, images, made, unsuitable, enlarged, read = (value / total for value in sums)
        return MeanSample(text, supervised, seen, images, made, True, unsuitable, enlarged, read, per_cell)
    text, supervised = task.typical_text
    image, sees, makes = image_tokens(image_config, pixels), float(task.condition is not None), float(task.makes_image)
    read = ASSUMED_BYTES_PER_TOKEN * text + ASSUMED_BYTES_PER_PIXEL * (sees + makes) * image * pixels**2
    sizes = (text, supervised, sees * image, sees, makes * image)
    return MeanSample(*sizes, measured=False, read_bytes=read, tokens_per_cell=per_cell)


def image_tokens(image_config: ImageConfig, pixels: int) -> float:
    """Visual tokens of one image; a mean at native resolution."""
    if image_config.mode == "native":
        return float(min(ASSUMED_NATIVE_TOKENS, image_config.max_tokens))
    return float((image_config.side // pixels) ** 2)


def tokenwise(side: float) -> tuple[int, int, int]:
    """(VAE tokens, least and most ViT tokens) of an image in a model that has the tokens of both encoders, as BAGEL.

    The VAE makes one token of 16 x 16 pixels. The ViT sees up to 512 pixels a side in patches of 16, 518 in
    patches of 14.
    """
    return round((side / 16) ** 2), int(min(side, 512) // 16) ** 2, int(min(side, 518) // 14) ** 2


def _row_means(row: dict[str, Any], task: Task, image_config: ImageConfig, pixels: int) -> tuple[float, ...]:
    """(text, supervised, seen, images_seen, made, unsuitable, enlarged, read_bytes) of an index row, as means over its
    alternatives."""

    def tokens(number: int) -> int:
        height, width = image_size(row["widths"][number], row["heights"][number], image_config, pixels)
        return height * width // pixels**2

    num = len(row["text_tokens"])
    shown = [[target] for target in row["target"]] if task.shows_target else row["context"]
    seen = sum(tokens(i) for context in shown for i in context)
    made = sum(tokens(i) for i in row["target"] if i >= 0)
    images = sum(len(context) for context in shown)
    used = [{*context, target} - {-1} for context, target in zip(shown, row["target"], strict=True)]
    sizes = list(zip(row["widths"], row["heights"], strict=True))
    bad = [not is_suitable(width, height, image_config) for width, height in sizes]
    grown = [tokens(number) * pixels**2 > 2 * width * height for number, (width, height) in enumerate(sizes)]
    unsuitable, enlarged = (sum(any(flags[i] for i in numbers) for numbers in used) for flags in (bad, grown))
    texts = sum(row["text_tokens"]), sum(row["supervised_tokens"])
    return (*(total / num for total in (*texts, seen, images, made, unsuitable, enlarged)), float(row["size"]))
