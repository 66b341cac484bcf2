"""Builds a sample from a record: the planned alternative, after condition dropout, with resized images."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from data_pipelines.planner.candidates import SampleRef
from data_pipelines.shards.images import display_size, image_members, load_image, open_image
from data_pipelines.shards.record import caption_alternative, missing_part, read_record
from data_pipelines.shards.record_map import RecordMap
from emma_train.config.schema import DataConfig, ImageConfig
from emma_train.sequence.geometry import image_size, to_patches
from emma_train.sequence.image_rules import EMMA_RULES, ImageRules
from emma_train.sequence.layout import ImageRole, Segment
from emma_train.sequence.pack import IGNORE_STEM, ImageTokens, Sample, image_segments
from emma_train.sequence.seeds import choice_of, seed_of, uniform_of
from emma_train.sequence.tasks import TASKS, Task
from emma_train.sequence.tokens import TextTokenizer

FindLatent = Callable[[str, ImageConfig], np.ndarray | None]
"""Cached latent of an image of the record, by its name and transform."""


class SampleError(Exception):
    """A sample that cannot be used: broken bytes, an undecodable image, an empty answer."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        """Its bytes could not be fetched after all retries; the object store may be down."""


class SampleBuilder:
    """Builds planned samples. Everything random is a function of (seed, epoch, sample key, what is drawn)."""

    def __init__(
        self, data: DataConfig, tokenizer: TextTokenizer, patch: int, shuffle: int, rules: ImageRules = EMMA_RULES
    ) -> None:
        self.data, self.tokenizer, self.patch, self.shuffle, self.rules = data, tokenizer, patch, shuffle, rules

    def sample(
        self,
        planned: SampleRef,
        members: Mapping[str, memoryview],
        find_latent: FindLatent,
        record_map: RecordMap | None = None,
    ) -> Sample:
        """The sample of a record; the map says how records of foreign tars are read.

        Raises SampleError, and any error that a library raises on foreign data.
        """
        draw, task = (self.data.seed, planned.epoch, planned.key), TASKS[planned.task]
        questions = self.data.caption_questions
        question = questions[choice_of(len(questions), *draw, "caption question")]
        record = read_record(members, question, record_map)
        if planned.caption is None:
            alternative = record[task.record_key][planned.alternative]
        else:
            alternative = caption_alternative(task, next(iter(image_members(members))), planned.caption, question)
        if missing := missing_part(alternative, planned.task):
            raise SampleError(missing)
        segments = self._segments(task, alternative, draw)
        image_config = task.image_config(self.data)
        if planned.max_tokens:
            image_config = replace(image_config, max_tokens=min(image_config.max_tokens, planned.max_tokens))
        shown = {image.name for image in image_segments(segments) if image.role is not ImageRole.TARGET}
        files, images = image_members(members), {}
        for name in dict.fromkeys(image.name for image in image_segments(segments)):
            latent = find_latent(name, image_config)
            # The model sees no patches of a target; the autoencoder does not need them where the latent is cached.
            grid, patches = self._pixels(files[name], image_config, decode=name in shown or latent is None)
            stem = self._stem_label(planned, record) if name in shown else IGNORE_STEM
            images[name] = ImageTokens(grid, patches, latent, stem)
        return Sample(
            key=planned.key,
            task=planned.task,
            segments=segments,
            images=images,
            noise_seed=seed_of(*draw, "noise"),
            time_seed=seed_of(*draw, "time"),
            rules=self.rules,
        )

    def _stem_label(self, planned: SampleRef, record: dict[str, Any]) -> int:
        """1 for STEM, 0 for general, -1 for unknown."""
        tags = record.get("tags", [])
        label = int("stem" in tags) or -int("general" not in tags) if planned.stem is None else planned.stem
        return 0 if label < 0 and self.data.untagged == "general" else label

    def _segments(self, task: Task, alternative: dict[str, Any], draw: tuple[int, int, str]) -> list[Segment]:
        """The layout; a task that makes an image loses its text or its images by chance (condition dropout)."""
        images = task.shown_images(alternative)
        if task.makes_image:
            if uniform_of(*draw, "text dropout") < self.data.text_dropout:
                alternative = {**alternative, "text": ""}
            if images and uniform_of(*draw, "reference dropout") < self.data.reference_dropout:
                images = []
        return task.layout(self.tokenizer, images, alternative)

    def _pixels(
        self, data: memoryview, image_config: ImageConfig, decode: bool
    ) -> tuple[tuple[int, int], np.ndarray | None]:
        """Grid of visual tokens (rows, columns), and the patches if `decode`."""
        pixels = self.patch * self.shuffle
        with open_image(data) as image:
            height, width = image_size(*display_size(image), image_config, pixels)
            grid = (height // pixels, width // pixels)
            if not decode:
                return grid, None
            loaded = load_image(image, height, width, crop=image_config.mode == "crop")
            return grid, to_patches(loaded, self.patch, self.shuffle)
