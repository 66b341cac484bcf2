"""Plan -> packed batches of this rank, read ahead by stateless workers: the trainer's process plans, they read."""

import logging
import math
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.loader.pack_buffer import PackBuffer
from data_pipelines.loader.reader import Reader
from data_pipelines.loader.sample_builder import SampleError
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.planner import Planner, StepPlan
from emma_train.config.check import check_world
from emma_train.config.schema import Recipe
from emma_train.errors import RunError, UserError
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step_batches import StepBatches, UnreadableSample
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.object_store import is_local

log = logging.getLogger(__name__)
Item = tuple[int, int, tuple[SampleRef, ...]]
"""Step, slot and the samples that it is made of."""
STATE_SCHEMA = 2
SPARES = 8
"""How many spares are tried in the place of a sample that cannot be read, before it is left out."""
READS_AT_ONCE = 16
"""Requests to a store that a worker has under way."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Slot:
    """One pack and what went wrong while it was read."""

    batch: PackedBatch
    unreadable: list[UnreadableSample]
    replaced: int


class Stream:
    """Packed batches of one rank: slots rank, rank + size, ... of every step. Raises UserError on bad input."""

    def __init__(self, recipe: Recipe, rank: int, size: int, latents: str | None, pin: bool = False) -> None:
        """`latents` is the fingerprint of the autoencoder, to use cached latents where they fit. `pin` puts packs into
        pinned memory, from which a GPU copies while it computes."""
        check_world(recipe.data.slots, size)
        tokenizer = TextTokenizer(recipe.data.tokenizer)
        if tokenizer.vocab > recipe.model.decoder.vocab:
            raise UserError(
                f"data.tokenizer {tokenizer.path} has {tokenizer.vocab} tokens, more than model.decoder.vocab="
                f"{recipe.model.decoder.vocab}"
            )
        self.recipe, self.rank, self.size, self.pin = recipe, rank, size, pin
        self.planner = Planner(recipe, tokenizer)
        vision = recipe.model.vision
        self.dataset = _Slots(self.planner, Reader(recipe.data, tokenizer, vision.patch, vision.shuffle, latents))

    def state(self, step: int) -> dict[str, Any]:
        """All that a checkpoint needs to go on after `step` consumed steps, on any number of ranks and workers."""
        return {
            "schema": STATE_SCHEMA,
            "step": step,
            "seed": self.recipe.data.seed,
            "manifests": self.planner.fingerprint,
            "tasks": self.planner.state(step),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint's state says. Raises UserError where it is of other data; the escape hatch is
        resume.allow=[data.sources]."""
        if state.get("schema") != STATE_SCHEMA:
            raise UserError(
                f"the checkpoint's state of the data has schema {state.get('schema')}, this version reads "
                f"{STATE_SCHEMA}; go on with the version that wrote it, or start a new run with init.from"
            )
        if state["manifests"] != self.planner.fingerprint and "data.sources" not in self.recipe.resume.allow:
            raise UserError(
                "data.sources: the shards differ from those of the checkpoint, so the order of samples would too; "
                "bring the old shards back, or accept with resume.allow=[data.sources]"
            )
        self.planner.load(state["step"], state["tasks"])

    def steps(self, first: int, last: int) -> Iterator[StepBatches]:
        """Steps first to last, both included; the last one given may be a failure, which has no packs."""
        plans: deque[StepPlan] = deque()
        slots = self._slots(self._items(first, last, plans))
        for step in range(first, last + 1):
            started = time.perf_counter()
            got: list[Slot] = []
            failure: Exception | None = None
            try:
                got = [next(slots) for _ in range(self.recipe.data.slots // self.size)]
            except (UserError, RunError) as error:
                failure = error
            except (RuntimeError, OSError, EOFError) as error:
                failure = dead_worker(error)
            plan = plans.popleft() if plans else None
            self.planner.forget(step - 1)
            yield StepBatches(
                step=step,
                packs=[slot.batch for slot in got] if failure is None else [],
                digest=plan.digest if plan else "",
                straggler=plan.straggler if plan else math.nan,
                unreadable=[sample for slot in got for sample in slot.unreadable],
                wait_s=time.perf_counter() - started,
                filled=plan.filled if plan else 0.0,
                too_long=plan.too_long if plan else 0,
                replaced=sum(slot.replaced for slot in got),
                epoch=plan.epoch if plan else 0.0,
                failure=failure,
            )
            if failure is not None:
                return

    def _items(self, first: int, last: int, plans: "deque[StepPlan]") -> Iterator[Item]:
        """What this rank reads, planned when it is asked for; the plans are put down for `steps`."""
        for step in range(first, last + 1):
            plan = self.planner.plan(step)
            plans.append(replace(plan, offers=[], places=[]))
            for slot in range(self.rank, self.recipe.data.slots, self.size):
                yield step, slot, plan.slot(slot)

    def _slots(self, items: Iterator[Item]) -> Iterator[Slot]:
        data = self.recipe.data
        if data.workers == 0:
            return _read_ahead(self.dataset, items, data.prefetch, self.pin)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_Listed(items),
            num_workers=data.workers,
            prefetch_factor=data.prefetch,
            pin_memory=self.pin,
            multiprocessing_context="fork",
            worker_init_fn=_start_worker,
        )
        return _received(loader)


def dead_worker(error: Exception) -> RunError:
    """The one line about a loader worker that died, from what torch raises; other errors are raised again.

    Bytes of a pack are fetched from the worker that made it, so its death is also a connection that breaks.
    """
    told = str(error).splitlines()[0].rstrip(". ") if str(error) else ""
    if isinstance(error, (ConnectionError, EOFError)):
        told = f"a DataLoader worker died ({type(error).__name__})"
    elif "DataLoader worker (pid" not in told:
        raise error
    return RunError(
        f"{told}. A kill is mostly the kernel's, for memory: lower data.workers or data.prefetch. "
        f"The same command goes on from the last checkpoint"
    )


class _Slots(Dataset["PackBuffer | UserError | RunError"]):
    """Planned samples -> pack; the same in every process."""

    def __init__(self, planner: Planner, reader: Reader) -> None:
        """The planner is asked for spares alone."""
        self.planner, self.reader = planner, reader

    def __getitem__(self, item: Item) -> "PackBuffer | UserError | RunError":
        # Returned, not raised: torch would wrap what a worker raises in that worker's traceback.
        try:
            slot = self.read(item)
        except (UserError, RunError) as error:
            return error
        return PackBuffer.of(slot.batch, (slot.unreadable, slot.replaced), shared=True)

    def read(self, item: Item) -> Slot:
        """The pack of one slot. Raises RunError where nothing of it can be read."""
        step, slot, planned = item
        samples, bad, replaced = self._samples(planned, latents=True)
        if not _alike(samples):
            samples, bad, replaced = self._samples(planned, latents=False)
        if not samples:
            raise RunError(f"step {step}: no sample of slot {slot} can be read, nor a spare; the last: {bad[-1]}")
        return Slot(pack(samples, len(planned) - len(samples)), bad, replaced)

    def _samples(self, slot: Sequence[SampleRef], latents: bool) -> tuple[list[Sample], list[UnreadableSample], int]:
        """What can be read of a slot, what cannot, and how many spares are among the former."""
        samples: list[Sample] = []
        bad: list[UnreadableSample] = []
        replaced = 0
        for sample, problems in self._each(slot, latents):
            bad += problems
            if sample is not None:
                samples.append(sample)
                replaced += bool(problems)
        return samples, bad, replaced

    def _each(self, slot: Sequence[SampleRef], latents: bool) -> Iterator[tuple[Sample | None, list[UnreadableSample]]]:
        """Each of a slot, in order; of remote shards many at once, since most of the time is waiting for answers."""
        if all(is_local(planned.url) for planned in slot):
            yield from (self._read_or_spare(planned, latents) for planned in slot)
            return
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            yield from pool.map(lambda planned: self._read_or_spare(planned, latents), slot)

    def _read_or_spare(self, planned: SampleRef, latents: bool) -> tuple[Sample | None, list[UnreadableSample]]:
        """The sample, or the first of its spares that can be read, and what could not be. Raises RunError where the
        store does not answer: to go through spares then would take hours, in which all ranks wait."""
        bad: list[UnreadableSample] = []
        unreachable = 0
        wanted: SampleRef | None = planned
        for attempt in range(SPARES + 1):
            if wanted is None:
                break
            try:
                sample = self.reader.read(wanted, latents)
            except SampleError as error:
                bad.append(
                    UnreadableSample(wanted.key, wanted.task, os.path.basename(urlsplit(wanted.url).path), str(error))
                )
                unreachable += error.unreachable
                if unreachable == 2:
                    raise RunError(f"{error}; nor could {planned.key} be read before it. Is the store up?") from None
                wanted = self.planner.spare(planned, attempt)
                continue
            return sample, [replace(b, replaced_by=wanted.key) for b in bad]
        return None, bad


def _alike(samples: list[Sample]) -> bool:
    """Whether a pack can be made: it takes the latents of all its images, or encodes all and needs their pixels."""
    images = [p for sample in samples for p in sample.images.values()]
    return all(p.latent is not None for p in images) or all(p.patches is not None for p in images)


class _Listed(Sampler[Item]):
    def __init__(self, items: Iterator[Item]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Item]:
        return self.items


def _start_worker(number: int) -> None:
    """A request to stop goes to all processes of a job. The trainer acts on it, and needs its workers until then, so
    they heed the trainer's own signal only."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    trainer = os.getppid()

    def watch() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=watch, name="stop-signals", daemon=True).start()


def _received(results: Iterable[PackBuffer | UserError | RunError]) -> Iterator[Slot]:
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield Slot(result.batch(), *result.other)


def _read_ahead(dataset: _Slots, items: Iterable[Item], depth: int, pin: bool) -> Iterator[Slot]:
    """Read in one background thread, `depth` packs ahead; an error is raised where its pack would have come."""
    ready: queue.Queue[Slot | BaseException | None] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def put(result: Slot | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(result, timeout=0.2)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in items:
                slot = dataset.read(item)
                put(replace(slot, batch=PackBuffer.of(slot.batch).pin_memory().batch()) if pin else slot)
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
