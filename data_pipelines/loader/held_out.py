"""Packs of held-out samples for validation: a function of the recipe alone, divided among the ranks.

Order, noise and flow times come from SEED, not from data.seed, so that stages of different seeds compare. No prompt
and no reference is dropped.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_pipelines.loader.loader import PlannedSlot, SlotDataset
from data_pipelines.loader.reader import SampleReader
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.planner import Planner
from data_pipelines.planner.sources import has_wanted_tags
from data_pipelines.shards.index import read_manifest
from emma_train.config.check import validated_tasks
from emma_train.config.schema import MixConfig, Recipe, SourceConfig
from emma_train.errors import UserError
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.sequence.validation_batches import RankPacks, ValidationBatches
from emma_train.storage.shard_reader import ShardReader

log = logging.getLogger(__name__)
SEED = 0


def read_validation_batches(
    recipe: Recipe, rank: int, size: int, autoencoder_fingerprint: str | None, ask: bool = True
) -> ValidationBatches:
    """The held-out packs of data-parallel rank `rank` of `size`; `ask` false reads no questions.

    Raises UserError where a folder is missing or has no sample of a task that its entry names.
    """
    validate, tasks = recipe.validate, validated_tasks(recipe)
    samples = _HeldOut(recipe, autoencoder_fingerprint, "sources", validate.sources, tasks, validate.num_samples)
    questions = _HeldOut(
        recipe, autoencoder_fingerprint, "questions", validate.questions if ask else [], ["i2t"], validate.num_questions
    )
    log.info("validation: %d held-out samples, %d questions", len(samples.refs), len(questions.refs))
    lines = [f"{ref.key} {ref.task} {ref.alternative}" for part in (samples, questions) for ref in part.refs]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    return ValidationBatches(samples.packs(rank, size), questions.packs(rank, size), digest)


class _HeldOut:
    """The planned packs of the samples of some tasks, each pack with one task."""

    def __init__(
        self,
        recipe: Recipe,
        autoencoder_fingerprint: str | None,
        key: str,
        sources: Sequence[SourceConfig],
        tasks: Sequence[str],
        num: int,
    ) -> None:
        """`key`: of the section validate, for errors; `num`: most samples of a task."""
        self._slots: list[tuple[SampleRef, ...]] = []
        if not (offered := _offered_tasks(recipe, key, sources, tasks)):
            return
        held_out = _recipe_of(recipe, sources, offered)
        tokenizer, vision = TextTokenizer(recipe.data.tokenizer, recipe.data.template), recipe.model.vision
        try:
            planner = Planner(held_out, tokenizer)
            for task in offered:
                self._slots += planner.first_packs(task, num)
        except UserError as error:
            raise UserError(f"validate.{key}: {error}") from None
        reader = SampleReader(
            held_out.data, tokenizer, vision.patch, vision.shuffle, autoencoder_fingerprint, image_rules(held_out.model)
        )
        self._dataset = SlotDataset(planner, reader)

    @property
    def refs(self) -> list[SampleRef]:
        """The samples of all packs."""
        return [ref for slot in self._slots for ref in slot]

    def packs(self, rank: int, size: int) -> RankPacks:
        """Packs rank, rank + size, ..., and repeated ones for ranks that have one less than others."""
        if not self._slots:
            return RankPacks()
        numbers = range(rank, len(self._slots), size)
        packs = []
        for number in numbers or [0]:
            slot = self._dataset.read(PlannedSlot(0, number, self._slots[number]))
            for failed in slot.unreadable:
                log.warning("validation: %s cannot be read (%s)", failed.key, failed.reason)
            packs.append(slot.batch)
        rounds = -(-len(self._slots) // size)
        return RankPacks([*packs, *packs[-1:] * (rounds - len(packs))], len(numbers))


def _offered_tasks(recipe: Recipe, key: str, sources: Sequence[SourceConfig], tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that an entry names, or of which one that names none has samples. Raises UserError."""
    storage, offered = ShardReader.from_config(recipe.data), set()
    for index, source in enumerate(sources):
        try:
            manifest = read_manifest(source.path, storage)
        except UserError as error:
            raise UserError(f"validate.{key}[{index}]: {error}") from None
        offered |= set(source.tasks) or {task for task in tasks if _has_samples(manifest, source, task)}
    return [task for task in tasks if task in offered]


def _has_samples(manifest: dict[str, Any], source: SourceConfig, task: str) -> bool:
    tags = [names for entry in manifest["shards"] for names in entry["tags"].get(TASKS[task].record_key, {})]
    return any(has_wanted_tags(source, names.split("|")) for names in tags)


def _recipe_of(recipe: Recipe, sources: Sequence[SourceConfig], tasks: Sequence[str]) -> Recipe:
    """A recipe whose first samples are the held-out ones."""
    data = replace(
        recipe.data,
        sources=list(sources),
        phases=[],
        seed=SEED,
        samples_per_step=0,
        mix_by="samples",
        text_dropout=0.0,
        reference_dropout=0.0,
    )
    return replace(recipe, data=data, mix=MixConfig(**dict.fromkeys(tasks, 1)))
