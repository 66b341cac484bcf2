"""Which samples make optimizer step k (contract 2): a pure function of (seed, k, manifests), the same on every rank.

A step takes a fixed number of samples of each task, so that the ratio is exact, and spreads them over the slots so that
every pack holds every task of the mix and costs about the same. World size never enters: ranks only decide who computes
which slot. Sample p of a task stands at place p mod n of epoch p div n, each epoch in an order of its own.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipelines.stream.index import read_columns, read_manifest
from data_pipelines.stream.storage import Storage, join, shown
from emma_train.config.check import TASKS, phases, samples_per_task
from emma_train.config.errors import UserError
from emma_train.config.schema import ImageConfig, Recipe, SourceConfig
from emma_train.sequence.geometry import picture_size
from emma_train.sequence.seeds import choice_of, seed_of
from emma_train.sequence.tokens import TextTokenizer


@dataclass(frozen=True)
class Planned:
    """One sample of a plan: where it is, which alternative is drawn, and what it costs at most."""

    key: str
    task: str
    url: str
    """Of the shard."""
    shard: str
    """sha256 of the tar in the manifest."""
    offset: int
    size: int
    crc32: int
    epoch: int
    alternative: int
    num_tokens: int
    """LLM tokens before any condition dropout."""
    num_visual: int
    """Visual tokens that the vision encoder sees."""

    @property
    def cost(self) -> int:
        """Work of the sample in LLM tokens; four patches a visual token at a quarter of the decoder's work each."""
        return self.num_tokens + self.num_visual


@dataclass(frozen=True)
class StepPlan:
    step: int
    slots: tuple[tuple[Planned, ...], ...]
    digest: str
    """Hash of the keys, choices and places of all samples of the step."""

    @property
    def straggler(self) -> float:
        """Cost of the heaviest slot over the mean."""
        costs = [sum(s.cost for s in slot) for slot in self.slots]
        return max(costs) * len(costs) / sum(costs)


@dataclass(frozen=True)
class _Phase:
    start: int
    """Steps before it."""
    counts: dict[str, int]
    """Samples per step, by task."""
    rows: dict[str, list[dict[str, Any]]]
    taken: dict[str, int]
    """Samples that earlier phases took: a phase goes on where they stopped, so that a source that two phases share does
    not start again with the same samples, choices and noise."""

    def position(self, task: str, steps: int) -> int:
        """Samples of a task that were taken after `steps` steps."""
        return self.taken[task] + (steps - self.start) * self.counts[task]


class Planner:
    """The plan of any step. Holds the index of the sources; every answer is a pure function of its arguments."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        """Reads manifests and indexes. Raises UserError where one is missing, of another tokenizer or without samples,
        or where a phase's first step does not fit data.pack_tokens.
        """
        self.data, self.pixels = recipe.data, recipe.model.autoencoder.pixels
        self.manifest_hash = hashlib.sha256()
        self._phases: list[_Phase] = []
        start, taken = 0, dict.fromkeys(TASKS, 0)
        for phase in phases(recipe):
            counts = samples_per_task(phase.mix, self.data.samples_per_step)
            rows = {task: self._rows(phase.sources, task, tokenizer) for task in counts}
            self._phases.append(_Phase(start, counts, rows, dict(taken)))
            start += phase.steps
            for task, count in counts.items():
                taken[task] += phase.steps * count
        self.fingerprint = self.manifest_hash.hexdigest()[:16]
        for planned in self._phases:
            self.plan(planned.start + 1)  # arithmetic that cannot work is told now, not once the model is built

    @lru_cache(maxsize=4)  # noqa: B019 - one planner a process, and loader and trainer ask for the same step
    def plan(self, step: int) -> StepPlan:
        """The slots of optimizer step `step`, from 1. Raises UserError where they exceed data.pack_tokens."""
        phase = self._phase(step)
        slots: list[list[Planned]] = [[] for _ in range(self.data.slots)]
        costs = [0] * len(slots)
        for task, count in phase.counts.items():
            first = phase.position(task, step - 1)
            samples = [self._sample(phase.rows[task], task, first + i) for i in range(count)]
            _spread(samples, slots, costs)
        for slot in slots:
            if (tokens := sum(s.num_tokens for s in slot)) > self.data.pack_tokens:
                raise UserError(
                    f"step {step} packs {tokens} tokens into one slot, more than "
                    f"data.pack_tokens={self.data.pack_tokens}; "
                    f"raise it, or data.slots, or lower data.samples_per_step={self.data.samples_per_step}"
                )
        lines = "\n".join(f"{s.key} {s.task} {s.alternative} {s.epoch}" for slot in slots for s in slot)
        digest = hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()
        return StepPlan(step, tuple(tuple(slot) for slot in slots), digest)

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of the current phase's samples have passed for each of its tasks after `step` steps."""
        phase = self._phase(step)
        return {task: phase.position(task, step) / len(rows) for task, rows in phase.rows.items()}

    def spare(self, planned: Planned, attempt: int) -> Planned | None:
        """What may stand for a sample that cannot be read: of its task and sources, no longer than it; None where there
        is nothing. A pure function of (seed, the sample, attempt)."""
        rows = next(phase.rows[planned.task] for phase in self._phases if planned.task in phase.rows)
        start = choice_of(len(rows), self.data.seed, planned.epoch, planned.key, f"spare {attempt}")
        for number in range(min(64, len(rows))):
            row = rows[(start + number) % len(rows)]
            found = self._planned(row, planned.task, planned.epoch)
            if found.key != planned.key and found.num_tokens <= planned.num_tokens:
                return found
        return None

    def _phase(self, step: int) -> "_Phase":
        return next(phase for phase in reversed(self._phases) if step > phase.start)

    def _rows(self, sources: list[SourceConfig], task: str, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for source in sources:
            if source.tasks and task not in source.tasks:
                continue
            folder, storage = source.path, Storage.of(self.data)
            manifest = read_manifest(folder, storage)
            if manifest["tokenizer_sha256"] != tokenizer.sha256:
                raise UserError(
                    f"{shown(folder)}: was indexed with another tokenizer than data.tokenizer ({tokenizer.path}); "
                    f"run `emma-data index {shown(folder)} --tokenizer {tokenizer.path}`"
                )
            for shard in manifest["shards"]:
                self.manifest_hash.update(f"{shard['sha256']}{task}".encode())
                url = join(folder, shard["name"])
                table = read_columns(folder, shard["name"], task, None, storage, shard["index_sha256"])
                for row in table.to_pylist():
                    if set(source.require_tags) <= set(row["tags"]):
                        rows.append({**row, "url": url, "shard": shard["sha256"]})
        if not rows:
            raise UserError(
                f"mix.{task} is above 0, but no sample of {', '.join(s.path for s in sources)} has that task"
                + " and the required tags" * any(s.require_tags for s in sources)
            )
        return rows

    def _sample(self, rows: list[dict[str, Any]], task: str, position: int) -> Planned:
        epoch, place = divmod(position, len(rows))
        return self._planned(rows[int(_order(self.data.seed, task, epoch, len(rows))[place])], task, epoch)

    def _planned(self, row: dict[str, Any], task: str, epoch: int) -> Planned:
        alternative = choice_of(len(row["text_tokens"]), self.data.seed, epoch, row["key"], f"{task} alternative")
        image = self.data.und if task == "i2t" else self.data.gen
        seen = sum(self._visual_tokens(row, number, image) for number in row["context"][alternative])
        target = row["target"][alternative]
        made = self._visual_tokens(row, target, image) if target >= 0 else 0
        return Planned(
            key=row["key"],
            task=task,
            url=row["url"],
            shard=row["shard"],
            offset=row["offset"],
            size=row["size"],
            crc32=row["crc32"],
            epoch=epoch,
            alternative=alternative,
            num_tokens=row["text_tokens"][alternative] + seen + made,
            num_visual=seen,
        )

    def _visual_tokens(self, row: dict[str, Any], number: int, image: ImageConfig) -> int:
        height, width = picture_size(row["widths"][number], row["heights"][number], image, self.pixels)
        return height * width // self.pixels**2


def _spread(samples: list[Planned], slots: list[list[Planned]], costs: list[int]) -> None:
    """Deal the samples of one task to the slots, in place: as many to each, costliest first to the lightest slot."""
    share, extra = divmod(len(samples), len(slots))
    taken = [0] * len(slots)
    for sample in sorted(samples, key=lambda s: (-s.cost, s.key)):
        # What does not divide goes to light slots too; fixed ones would collect the extra sample of every task.
        open_slots = (i for i in range(len(slots)) if taken[i] < share + (extra > 0))
        lightest = min(open_slots, key=lambda i: (costs[i], i))
        extra -= taken[lightest] == share
        slots[lightest].append(sample)
        costs[lightest] += sample.cost
        taken[lightest] += 1


@lru_cache(maxsize=16)
def _order(seed: int, task: str, epoch: int, num: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed_of(seed, epoch, task, "order"))).permutation(num)
