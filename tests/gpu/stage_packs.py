"""Packs in the shape of each stage's recipe, of random images and text."""

from dataclasses import dataclass

import numpy as np

from emma_train.config.schema import Recipe
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, Sample


@dataclass(frozen=True)
class PackShape:
    """A pack of a recipe in recipes/emma-4b."""

    samples: dict[str, int]
    """By task."""
    side: int
    """Visual tokens on the side of an image."""


SHAPES = {
    "stage0": PackShape({"i2t": 4}, 16),
    "stage1": PackShape({"i2t": 8, "t2i": 8}, 16),
    "stage2": PackShape({"i2t": 2, "t2i": 2, "it2i": 2}, 32),
    "stage3": PackShape({"i2t": 1, "t2i": 1, "it2i": 1}, 32),
    "stage4_expert": PackShape({"i2t": 4}, 32),
    "stage4_router": PackShape({"i2t": 4}, 32),
}
"""Images of stages 0 and 1 are of 512², those of the others of 1024². Stage 2 is its last phase."""


def samples_of_pack(
    recipe: Recipe, key: str, shape: PackShape, rng: np.random.Generator, times: float = 1.0, fine: bool = False
) -> list[Sample]:
    """`times` as many samples as in the shape, tasks in turn. `fine`: images to make and references have two tokens on
    the side for one."""
    counts = {task: max(1, round(times * count)) for task, count in shape.samples.items()}
    gen_side = shape.side * (1 + fine)
    return [
        make_sample(recipe, f"{key}-{number}-{task}", task, shape.side, gen_side, rng)
        for number in range(max(counts.values()))
        for task, count in counts.items()
        if number < count
    ]


def make_sample(recipe: Recipe, key: str, task: str, seen_side: int, gen_side: int, rng: np.random.Generator) -> Sample:
    """A sample with about 130 tokens of text in it, of which an understanding one predicts half; sides in visual
    tokens."""
    vision, channels = recipe.model.vision, recipe.model.autoencoder.channels

    def text(low: int, high: int, supervised: bool = False) -> TextSegment:
        ids = rng.integers(0, recipe.model.decoder.vocab, int(rng.integers(low, high)))
        return TextSegment(tuple(int(i) for i in ids), supervised)

    def image(side: int, with_pixels: bool) -> ImageTokens:
        shape = (side**2 * vision.shuffle**2, 3 * vision.patch**2)
        patches = rng.integers(0, 256, shape, dtype=np.uint8) if with_pixels else None
        latent = rng.standard_normal((side**2, channels), dtype=np.float32)
        return ImageTokens((side, side), patches, latent, stem=int(rng.integers(0, 2)))

    noise_seed, time_seed = (int(seed) for seed in rng.integers(0, 2**40, 2))
    if task == "i2t":
        segments: list[Segment] = [text(4, 5), ImageSegment("a", ImageRole.UND), text(40, 80), text(48, 96, True)]
        return Sample(key, task, segments, {"a": image(seen_side, with_pixels=True)}, noise_seed, time_seed)
    segments = [text(96, 160), ImageSegment("b", ImageRole.TARGET)]
    images = {"b": image(gen_side, with_pixels=False)}
    if task == "it2i":
        segments.insert(0, ImageSegment("a", ImageRole.REFERENCE))
        images["a"] = image(gen_side, with_pixels=True)
    return Sample(key, task, segments, images, noise_seed, time_seed)
