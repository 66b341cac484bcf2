"""From a record to a sample: the planned alternative, less what chance drops, with its pictures at their size."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipelines.stream.offers import Planned
from data_pipelines.stream.pictures import load_picture, open_picture, pictures_of
from data_pipelines.stream.record import lacks_text, read_record
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence import layout
from emma_train.sequence.geometry import picture_size, to_patches
from emma_train.sequence.pack import IGNORE_STEM, Pixels, Sample
from emma_train.sequence.seeds import seed_of, uniform_of
from emma_train.sequence.tokens import TextTokenizer

FindLatent = Callable[[str, ImageConfig], np.ndarray | None]
"""Cached latent of a picture of the record, by its name and transform."""


class BadSample(Exception):
    """A sample that cannot be used: broken bytes, an undecodable picture, an empty answer."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        """Its bytes did not come, after all tries; the fault may be the store's."""


class Sampler:
    """Makes samples as the plan wants them. Everything random is drawn from (seed, epoch, key, what is drawn)."""

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer, patch: int, shuffle: int) -> None:
        self.data, self.tokenizer, self.patch, self.shuffle = data, tokenizer, patch, shuffle

    def sample(self, planned: Planned, members: Mapping[str, memoryview], find_latent: FindLatent) -> Sample:
        """The sample of a record. Raises BadSample, or whatever a stranger's data makes a library raise."""
        record = read_record(members)
        alternative = record[planned.task][planned.alternative]
        if lack := lacks_text(alternative, planned.task):
            raise BadSample(lack)
        draw = (self.data.seed, planned.epoch, planned.key)
        segments = self._segments(planned.task, alternative, draw)
        files, pictures = pictures_of(members), {}
        for picture in (s for s in segments if isinstance(s, layout.Picture)):
            image = self.data.und if picture.role is layout.Role.UND else self.data.gen
            if planned.max_tokens:
                image = replace(image, max_tokens=min(image.max_tokens, planned.max_tokens))
            latent = find_latent(picture.name, image)
            decode = picture.role is not layout.Role.TARGET or latent is None
            grid, patches = self._pixels(files[picture.name], image, decode)
            pictures[picture.name] = Pixels(grid, patches, latent, _stem(record, picture.role))
        return Sample(
            key=planned.key,
            task=planned.task,
            segments=segments,
            pictures=pictures,
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

    def _pixels(self, data: memoryview, image: ImageConfig, decode: bool) -> tuple[tuple[int, int], np.ndarray | None]:
        """Grid of visual tokens, and the patches where they are wanted."""
        pixels = self.patch * self.shuffle
        with open_picture(data) as picture:
            height, width = picture_size(*picture.size, image, pixels)
            grid = (height // pixels, width // pixels)
            return grid, to_patches(load_picture(picture, height, width), self.patch, self.shuffle) if decode else None


def _stem(record: dict[str, Any], role: layout.Role) -> int:
    return IGNORE_STEM if role is layout.Role.TARGET else int("stem" in record.get("tags", []))
