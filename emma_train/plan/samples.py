"""How many tokens the mean sample of a task has: from the sources' indexes where they are on disk, else assumed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emma_train.config.mix import samples_per_task
from emma_train.config.schema import ImageConfig, PhaseConfig, Recipe, SourceConfig
from emma_train.errors import UserError
from emma_train.sequence.geometry import image_size

ASSUMED_TEXT = {"i2t": (160, 128), "t2i": (96, 0), "it2i": (64, 0)}
"""Mean text tokens of a sample, template included, and the supervised ones among them."""
ASSUMED_NATIVE_TOKENS = 1024
"""Mean visual tokens of an image at native resolution (photographs some 300, scanned pages some 3,600)."""
FILLED = 0.98
"""Share of the token slots that are filled where a step takes what its packs hold."""
INDEX_SHARDS = 8
"""Shards of a source whose index is read."""


@dataclass(frozen=True)
class MeanSample:
    """A mean sample of a task, in tokens."""

    text: float
    supervised: float
    seen: float
    """Visual tokens of images that are understood or edited."""
    images_seen: float
    made: float
    """Visual tokens of the target."""
    measured: bool
    """From indexes, not assumed."""

    @property
    def tokens(self) -> float:
        return self.text + self.seen + self.made


@dataclass(frozen=True)
class Load:
    """What one step of a phase holds."""

    phase: PhaseConfig
    samples: dict[str, int]
    """Samples a step by task."""
    means: dict[str, MeanSample]

    def total(self, value: Callable[[MeanSample], float], *tasks: str) -> float:
        """Sum of a value over the step's samples, of all tasks or some."""
        return sum(n * value(self.means[task]) for task, n in self.samples.items() if not tasks or task in tasks)

    @property
    def tokens(self) -> float:
        return self.total(lambda s: s.tokens)


def load_of(recipe: Recipe, phase: PhaseConfig) -> Load:
    """Samples and tokens of one step of a phase."""
    total = phase.mix.i2t + phase.mix.t2i + phase.mix.it2i
    shares = samples_per_task(phase.mix, total)
    means = {task: mean_sample(recipe, phase.sources, task) for task in shares}
    if recipe.data.samples_per_step:
        return Load(phase, samples_per_task(phase.mix, recipe.data.samples_per_step), means)
    # Packs that are filled: by samples a unit of the mix weighs its tokens, by tokens each task has its share of them.
    room = FILLED * recipe.data.slots * recipe.data.pack_tokens
    unit = sum(share * means[task].tokens for task, share in shares.items())
    if recipe.data.mix_by == "tokens":
        return Load(phase, {t: round(room * share / total / means[t].tokens) for t, share in shares.items()}, means)
    return Load(phase, {task: share * int(room // unit) for task, share in shares.items()}, means)


def mean_sample(recipe: Recipe, sources: list[SourceConfig], task: str) -> MeanSample:
    """Mean sample of a task: measured on the sources' indexes if all of them are on disk, else assumed."""
    image_config = recipe.data.und if task == "i2t" else recipe.data.gen
    pixels = recipe.model.autoencoder.pixels
    sources = [s for s in sources if not s.tasks or task in s.tasks]
    if sources and all((Path(s.path) / "manifest.json").is_file() for s in sources):
        rows = [row for source in sources for row in _index_rows(source, task)]
        if rows:
            columns = zip(*(_measure(row, image_config, pixels) for row in rows), strict=True)
            text, supervised, seen, images, made = (sum(column) / len(rows) for column in columns)
            return MeanSample(text, supervised, seen, images, made, measured=True)
    text, supervised = ASSUMED_TEXT[task]
    image, sees, makes = image_tokens(image_config, pixels), float(task != "t2i"), float(task != "i2t")
    return MeanSample(text, supervised, sees * image, sees, makes * image, measured=False)


def image_tokens(image_config: ImageConfig, pixels: int) -> float:
    """Visual tokens of one image; a mean at native resolution."""
    if image_config.mode == "native":
        return float(min(ASSUMED_NATIVE_TOKENS, image_config.max_tokens))
    return float((image_config.side // pixels) ** 2)


def tokenwise(side: float) -> tuple[int, int, int]:
    """(VAE tokens, least and most ViT tokens) of an image where the encoders' tokens stand side by side, as in BAGEL.

    The VAE makes one token of 16 x 16 pixels. The ViT sees up to 512 pixels a side in patches of 16, 518 in
    patches of 14.
    """
    return round((side / 16) ** 2), int(min(side, 512) // 16) ** 2, int(min(side, 518) // 14) ** 2


def _index_rows(source: SourceConfig, task: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    folder = Path(source.path)
    try:
        shards = json.loads((folder / "manifest.json").read_text())["shards"][:INDEX_SHARDS]
        indexes = [(folder / shard["name"]).with_suffix(".idx.parquet") for shard in shards]
        tables = [pq.read_table(index, filters=[("task", "=", task)]) for index in indexes]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot read manifest or index ({error}); `emma-data index` makes them") from None
    return [row for table in tables for row in table.to_pylist() if set(source.require_tags) <= set(row["tags"])]


def _measure(row: dict[str, Any], image_config: ImageConfig, pixels: int) -> tuple[float, ...]:
    """(text, supervised, seen, images seen, made) of a record, as means over its alternatives."""

    def tokens(number: int) -> int:
        height, width = image_size(row["widths"][number], row["heights"][number], image_config, pixels)
        return height * width // pixels**2

    num = len(row["text_tokens"])
    seen = sum(tokens(i) for context in row["context"] for i in context)
    made = sum(tokens(i) for i in row["target"] if i >= 0)
    images = sum(len(context) for context in row["context"])
    return tuple(x / num for x in (sum(row["text_tokens"]), sum(row["supervised_tokens"]), seen, images, made))
