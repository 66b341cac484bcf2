"""Plan -> packed batches of this rank, read ahead by stateless workers: the trainer's process plans, they read."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.stream.offers import Planned
from data_pipelines.stream.plan import Planner, StepPlan
from data_pipelines.stream.reader import BadSample, Reader
from emma_train.config.check import check_world
from emma_train.config.errors import UserError
from emma_train.config.schema import Recipe
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step import Bad, StepBatches
from emma_train.sequence.tokens import TextTokenizer

log = logging.getLogger(__name__)
Item = tuple[int, int, tuple[Planned, ...]]
"""Step, slot and the samples that it is made of."""


@dataclass(frozen=True)
class Slot:
    """One pack and what went wrong while it was read."""

    batch: PackedBatch
    bad: list[Bad]


class Stream:
    """Packed batches of one rank: slots rank, rank + size, ... of every step. Raises UserError on bad input."""

    def __init__(self, recipe: Recipe, rank: int, size: int, latents: str | None) -> None:
        """`latents` is the fingerprint of the autoencoder, to use cached latents where they fit."""
        check_world(recipe.data.slots, size)
        tokenizer = TextTokenizer(recipe.data.tokenizer)
        if tokenizer.vocab > recipe.model.decoder.vocab:
            raise UserError(
                f"data.tokenizer {tokenizer.path} has {tokenizer.vocab} tokens, more than model.decoder.vocab="
                f"{recipe.model.decoder.vocab}"
            )
        self.recipe, self.rank, self.size = recipe, rank, size
        self.planner = Planner(recipe, tokenizer)
        vision = recipe.model.vision
        self.dataset = _Slots(Reader(recipe.data, tokenizer, vision.patch, vision.shuffle, latents))

    def state(self, step: int) -> dict[str, Any]:
        """All that a checkpoint needs to go on after `step` consumed steps, on any number of ranks and workers."""
        return {
            "schema": 2,
            "step": step,
            "seed": self.recipe.data.seed,
            "manifests": self.planner.fingerprint,
            "tasks": self.planner.state(step),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint's state says. Raises UserError where it is of other data; the escape hatch is
        resume.allow=[data.sources]."""
        if state.get("manifests") != self.planner.fingerprint and "data.sources" not in self.recipe.resume.allow:
            raise UserError(
                "data.sources: the shards differ from those of the checkpoint, so the order of samples would too; "
                "bring the old shards back, or accept with resume.allow=[data.sources]"
            )
        self.planner.load(state["step"], state["tasks"])

    def steps(self, first: int, last: int) -> Iterator[StepBatches]:
        """Steps first to last, both included."""
        plans: deque[StepPlan] = deque()
        slots = self._slots(self._items(first, last, plans))
        for step in range(first, last + 1):
            started = time.perf_counter()
            got = [next(slots) for _ in range(self.recipe.data.slots // self.size)]
            wait_s = time.perf_counter() - started
            plan = plans.popleft()
            self.planner.forget(step - 1)
            bad = [b for slot in got for b in slot.bad]
            yield StepBatches(step, [s.batch for s in got], plan.digest, plan.straggler, bad, wait_s)

    def _items(self, first: int, last: int, plans: "deque[StepPlan]") -> Iterator[Item]:
        """What this rank reads, planned when it is asked for; the plans are put down for `steps`."""
        for step in range(first, last + 1):
            plan = self.planner.plan(step)
            plans.append(replace(plan, offers=[], places=[]))
            for slot in range(self.rank, self.recipe.data.slots, self.size):
                yield step, slot, plan.slot(slot)

    def _slots(self, items: Iterator[Item]) -> Iterator[Slot]:
        workers = self.recipe.data.workers
        if workers == 0:
            return _read_ahead(self.dataset, items, self.recipe.data.prefetch)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Listed(items),
            num_workers=workers,
            prefetch_factor=self.recipe.data.prefetch,
            multiprocessing_context="fork",
        )
        return _raised(loader)


class _Slots(Dataset["Slot | UserError"]):
    """Planned samples -> pack; the same in every process."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, item: Item) -> Slot | UserError:
        # Returned, not raised: torch would wrap what a worker raises in that worker's traceback.
        try:
            return self.read(item)
        except UserError as error:
            return error

    def read(self, item: Item) -> Slot:
        """The pack of one slot. Raises UserError where nothing of it can be read."""
        step, slot, planned_samples = item
        samples: list[Sample] = []
        bad: list[Bad] = []
        for planned in planned_samples:
            try:
                samples.append(self.reader.read(planned))
            except BadSample as error:
                bad.append(_bad(planned, error))
        if not samples:
            raise UserError(f"step {step}: no sample of slot {slot} can be read; the last: {bad[-1]}")
        return Slot(pack(samples, len(bad)), bad)


class _Listed(Sampler[Item]):
    def __init__(self, items: Iterator[Item]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        return self.items


def _bad(planned: Planned, error: BadSample) -> Bad:
    return Bad(planned.key, planned.task, planned.name, str(error))


def _raised(results: Iterable[Slot | UserError]) -> Iterator[Slot]:
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


def _read_ahead(dataset: _Slots, items: Iterator[Item], depth: int) -> Iterator[Slot]:
    """Read in one background thread, `depth` packs ahead; an error is raised where its pack would have come."""
    ready: queue.Queue[Slot | BaseException | None] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def put(result: Slot | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(result, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put(dataset.read(item))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over to the consumer's thread
            put(error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (result := ready.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        thread.join(timeout=5)
