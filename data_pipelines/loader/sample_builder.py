"""From a record to a sample: the planned alternative, less what chance drops, with its images at their size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipelines.planner.candidates import SampleRef
from data_pipelines.shards.images import images_of, load_image, open_image
from data_pipelines.shards.record import lacks_text, read_record
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence import layout
from emma_train.sequence.geometry import image_size, to_patches
from emma_train.sequence.pack import IGNORE_STEM, ImageTokens, Sample
from emma_train.sequence.seeds import seed_of, uniform_of
from emma_train.sequence.tokens import TextTokenizer

FindLatent = Callable[[str, ImageConfig], np.ndarray | None]
"""Cached latent of an image of the record, by its name and transform."""


class SampleError(Exception):
    """A sample that cannot be used: broken bytes, an undecodable image, an empty answer."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        """Its bytes did not come, after all tries; the fault may be the store's."""


class SampleBuilder:
    """Makes samples as the plan wants them. Everything random is drawn from (seed, epoch, key, what is drawn)."""

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer, patch: int, shuffle: int) -> None:
        self.data, self.tokenizer, self.patch, self.shuffle = data, tokenizer, patch, shuffle

    def sample(self, planned: SampleRef, members: Mapping[str, memoryview], find_latent: FindLatent) -> Sample:
        """The sample of a record. Raises BadSample, or whatever a stranger's data makes a library raise."""
        record = read_record(members)
        alternative = record[planned.task][planned.alternative]
        if lack := lacks_text(alternative, planned.task):
            raise SampleError(lack)
        draw = (self.data.seed, planned.epoch, planned.key)
        segments = self._segments(planned.task, alternative, draw)
        files, images = images_of(members), {}
        for image in (s for s in segments if isinstance(s, layout.ImageSegment)):
            image_config = self.data.und if image.role is layout.Role.UND else self.data.gen
            if planned.max_tokens:
                image_config = replace(image_config, max_tokens=min(image_config.max_tokens, planned.max_tokens))
            latent = find_latent(image.name, image_config)
            decode = image.role is not layout.Role.TARGET or latent is None
            grid, patches = self._pixels(files[image.name], image_config, decode)
            images[image.name] = ImageTokens(grid, patches, latent, _stem(record, image.role))
        return Sample(
            key=planned.key,
            task=planned.task,
            segments=segments,
            images=images,
            noise_seed=seed_of(*draw, "noise"),
            time_seed=seed_of(*draw, "time"),
        )

    def _segments(self, task: str, alternative: dict[str, Any], draw: tuple[int, int, str]) -> list[layout.Segment]:
        """The layout, of generation less the conditions that chance drops."""
        images = list(alternative.get("images", []))
        if task == "i2t":
            turns = [(turn["role"], turn["text"]) for turn in alternative["turns"]]
            return layout.i2t(self.tokenizer, images, turns)
        text = alternative["text"]
        if uniform_of(*draw, "text dropout") < self.data.text_dropout:
            text = ""
        if images and uniform_of(*draw, "reference dropout") < self.data.reference_dropout:
            images = []
        return layout.it2i(self.tokenizer, images, text, alternative["target"])

    def _pixels(
        self, data: memoryview, image_config: ImageConfig, decode: bool
    ) -> tuple[tuple[int, int], np.ndarray | None]:
        """Grid of visual tokens, and the patches where they are wanted."""
        pixels = self.patch * self.shuffle
        with open_image(data) as image:
            height, width = image_size(*image.size, image_config, pixels)
            grid = (height // pixels, width // pixels)
            return grid, to_patches(load_image(image, height, width), self.patch, self.shuffle) if decode else None


def _stem(record: dict[str, Any], role: layout.Role) -> int:
    return IGNORE_STEM if role is layout.Role.TARGET else int("stem" in record.get("tags", []))
