"""Plan -> packed batches of this rank, read ahead by stateless workers. The only state of the stream is the step."""

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.stream.plan import Planned, Planner, StepPlan
from data_pipelines.stream.reader import BadSample, Reader
from emma_train.config.check import check_world
from emma_train.config.errors import UserError
from emma_train.config.schema import Recipe
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step import Bad, StepBatches
from emma_train.sequence.tokens import TextTokenizer

log = logging.getLogger(__name__)


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
        self.dataset = _Slots(self.planner, Reader(recipe.data, tokenizer, vision.patch, vision.shuffle, latents))

    def state(self, step: int) -> dict[str, Any]:
        """All that a checkpoint needs to go on after `step` consumed steps, on any number of ranks and workers."""
        return {"schema": 1, "step": step, "seed": self.recipe.data.seed, "manifests": self.planner.fingerprint}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise UserError where a checkpoint's state is of other data; its escape hatch is
        resume.allow=[data.sources]."""
        mine = self.state(state.get("step", 0))
        if state.get("manifests") != mine["manifests"] and "data.sources" not in self.recipe.resume.allow:
            raise UserError(
                "data.sources: the shards differ from those of the checkpoint, so the order of samples would too; "
                "bring the old shards back, or accept with resume.allow=[data.sources]"
            )

    def steps(self, first: int, last: int) -> Iterator[StepBatches]:
        """Steps first to last, both included."""
        mine = [
            (step, slot)
            for step in range(first, last + 1)
            for slot in range(self.rank, self.recipe.data.slots, self.size)
        ]
        slots = self._slots(mine)
        for step in range(first, last + 1):
            started = time.perf_counter()
            got = [next(slots) for _ in range(self.recipe.data.slots // self.size)]
            wait_s = time.perf_counter() - started
            bad = [b for slot in got for b in slot.bad]
            plan = self.planner.plan(step)
            yield StepBatches(step, [s.batch for s in got], plan.digest, plan.straggler, bad, wait_s)

    def _slots(self, mine: list[tuple[int, int]]) -> Iterator[Slot]:
        workers = self.recipe.data.workers
        if workers == 0:
            return _read_ahead(self.dataset, mine, self.recipe.data.prefetch)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Listed(mine),
            num_workers=workers,
            prefetch_factor=self.recipe.data.prefetch,
            multiprocessing_context="fork",
        )
        return _raised(loader)


class _Slots(Dataset["Slot | UserError"]):
    """(step, slot) -> pack; the same in every process."""

    def __init__(self, planner: Planner, reader: Reader) -> None:
        self.planner, self.reader = planner, reader

    def __getitem__(self, index: tuple[int, int]) -> Slot | UserError:
        # Returned, not raised: torch would wrap what a worker raises in that worker's traceback.
        try:
            return self.read(*index)
        except UserError as error:
            return error

    def read(self, step: int, slot: int) -> Slot:
        """The pack of one slot. Raises UserError where the plan is impossible or nothing of it can be read."""
        plan: StepPlan = self.planner.plan(step)
        samples: list[Sample] = []
        bad: list[Bad] = []
        for planned in plan.slots[slot]:
            try:
                samples.append(self.reader.read(planned))
            except BadSample as error:
                bad.append(_bad(planned, error))
        if not samples:
            raise UserError(f"step {step}: no sample of slot {slot} can be read; the last: {bad[-1]}")
        return Slot(pack(samples, len(bad)), bad)


class _Listed(Sampler[tuple[int, int]]):
    def __init__(self, items: list[tuple[int, int]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def _bad(planned: Planned, error: BadSample) -> Bad:
    return Bad(planned.key, planned.task, Path(planned.tar).name, str(error))


def _raised(results: Iterable[Slot | UserError]) -> Iterator[Slot]:
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


def _read_ahead(dataset: _Slots, items: list[tuple[int, int]], depth: int) -> Iterator[Slot]:
    """Read in one background thread, `depth` packs ahead; an error is raised where its pack would have come."""
    ready: queue.Queue[Slot | BaseException] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def read() -> None:
        for item in items:
            try:
                result: Slot | BaseException = dataset.read(*item)
            except BaseException as error:  # handed over to the consumer's thread
                result = error
            while not stop.is_set():
                try:
                    ready.put(result, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(result, BaseException):
                return

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        for _ in items:
            result = ready.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        thread.join(timeout=5)
