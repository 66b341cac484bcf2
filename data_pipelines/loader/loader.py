"""Makes packed batches of one rank from the plan. The trainer's process plans; stateless workers read ahead."""

import errno
import gc
import itertools
import logging
import math
import os
import queue
import re
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.loader.current_reads import REPORT_SIGNAL, CurrentReads, WorkerReports
from data_pipelines.loader.pack_buffer import PackBuffer
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.sample_builder import SampleError
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.planner import Planner, StepPlan
from emma_train.config.check import check_world
from emma_train.config.schema import Recipe
from emma_train.config.stored import from_stored
from emma_train.errors import RunError, UserError, describe_shortage
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step_batches import StepBatches, UnreadableSample
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.urls import is_local

log = logging.getLogger(__name__)
STATE_SCHEMA = 3
OTHER_SHARDS = (
    "data.sources: the shards differ from those of the checkpoint, so the order of samples would too; bring the old "
    "shards back, or accept with resume.allow=[data.sources]"
)
MAX_SUBSTITUTES = 8
"""Number of substitutes that are tried for a sample that cannot be read, before it is dropped."""
SHARED_MEMORY = "/dev/shm"
READS_AT_ONCE = 16
"""Concurrent requests of one worker to an object store."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class PlannedSlot:
    """What a worker is asked to read: the samples of one pack."""

    step: int
    number: int
    """Index of the slot in the step."""
    samples: tuple[SampleRef, ...]


@dataclass(frozen=True)
class LoadedSlot:
    """One pack, and what went wrong while it was read."""

    batch: PackedBatch
    unreadable: list[UnreadableSample]
    replaced: int
    """Samples of the pack that are substitutes."""


def _never(step: int) -> bool:
    return False


class Stream:
    """Packed batches of one rank: slots rank, rank + size, ... of every step. Raises UserError on bad input."""

    def __init__(
        self, recipe: Recipe, rank: int, size: int, autoencoder_fingerprint: str | None, pin: bool = False
    ) -> None:
        """Cached latents are used if they are of the autoencoder with this fingerprint; None uses none. `pin` puts
        packs into pinned memory, from which a GPU copies while it computes."""
        check_world(recipe.data.slots, size)
        tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
        if tokenizer.vocab > recipe.model.decoder.vocab:
            raise UserError(
                f"data.tokenizer {tokenizer.path} has {tokenizer.vocab} tokens, more than model.decoder.vocab="
                f"{recipe.model.decoder.vocab}"
            )
        self.recipe = recipe
        self.rank = rank
        self.size = size
        self.pin = pin
        self.planner = Planner(recipe, tokenizer)
        vision = recipe.model.vision
        reader = SampleReader(
            recipe.data, tokenizer, vision.patch, vision.shuffle, autoencoder_fingerprint, image_rules(recipe.model)
        )
        self.dataset = SlotDataset(self.planner, reader)
        self._reports = WorkerReports()

    def describe(self) -> list[str]:
        """What the loader of this rank is doing, for the report of a run that hangs. Safe to call in any thread."""
        return [*self.dataset.reading.lines(), *self._reports.collect()]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to continue after `step` steps, on any number of ranks and workers."""
        return {
            "schema": STATE_SCHEMA,
            "step": step,
            "folders": self.planner.folders,
            **self.planner.state(step),
        }

    def resume(self, state: dict[str, Any], config: Mapping[str, Any] | None = None) -> None:
        """Continue from a checkpoint's state; `config` is its config, which a state of version 0.1.0 may need.

        Raises UserError if it is of other shards, unless the recipe has resume.allow=[data.sources].
        """
        accepted = {re.split(r"[.\[]", name)[0] for name in self.recipe.resume.allow} & {"data", "mix"}
        if state.get("schema") == 2:
            self._resume_tasks(state, config if accepted else None)
        elif state.get("schema") != STATE_SCHEMA:
            raise UserError(
                f"the checkpoint's state of the data has schema {state.get('schema')}, this version reads "
                f"{STATE_SCHEMA}; go on with the version that wrote it, or start a new run with init.from"
            )
        else:
            before, now = set(state["folders"]), set(self.planner.folders)
            if before - now and now - before and not self._may_change_sources():
                raise UserError(OTHER_SHARDS)
            for line in self.planner.load(state["step"], state):
                log.warning("%s", line)
        if accepted and state["step"] < self.recipe.train.steps:
            for line in self.planner.position_lines(state["step"]):
                log.info("%s", line)

    def _resume_tasks(self, state: dict[str, Any], config: Mapping[str, Any] | None) -> None:
        """Continue from a state of version 0.1.0; `config` is that of the checkpoint if the recipe has other data."""
        planner, step = self.planner, state["step"]
        if config is not None:
            try:
                tokenizer = TextTokenizer(self.recipe.data.tokenizer, self.recipe.data.template)
                planner = Planner(from_stored(config, "checkpoint"), tokenizer)
            except UserError as error:
                if not self._may_change_sources():
                    raise UserError(f"{error} (a source of the checkpoint; bring it back for one resume)") from None
        if state["manifests"] != planner.fingerprint:
            if not self._may_change_sources():
                raise UserError(OTHER_SHARDS)
            planner = self.planner
            log.warning("the checkpoint is of version 0.1.0 and of other shards: samples of an epoch may be repeated")
        planner.load_task_positions(step, state["tasks"])
        if planner is not self.planner:
            self.planner.load(step, planner.state(step))

    def _may_change_sources(self) -> bool:
        names = {name.partition("[")[0] for name in self.recipe.resume.allow}
        return bool(names & {"data", "data.sources", "data.phases"})

    def steps(self, first: int, last: int, is_skipped: Callable[[int], bool] = _never) -> Iterator[StepBatches]:
        """Steps first to last, both included. A skipped step is planned and not read: it has no packs. If a step fails,
        it is yielded with its `failure` and is the last."""
        plans: deque[StepPlan] = deque()
        slots = self._load(self._planned_slots(first, last, plans, is_skipped))
        for step in range(first, last + 1):
            started = time.perf_counter()
            loaded: list[LoadedSlot] = []
            failure: Exception | None = None
            skipped = is_skipped(step)
            try:
                if skipped:
                    plans.appendleft(self.planner.plan(step))
                else:
                    loaded = [next(slots) for _ in range(self.recipe.data.slots // self.size)]
            except Exception as error:  # all ranks have to know, or they would wait for this one
                failure = as_run_error(error, step)
            plan = plans.popleft() if plans else None
            self.planner.forget(step - 1)
            yield StepBatches(
                step=step,
                packs=[slot.batch for slot in loaded] if failure is None else [],
                digest=plan.digest if plan else "",
                straggler=plan.straggler if plan else math.nan,
                unreadable=[sample for slot in loaded for sample in slot.unreadable],
                wait_s=time.perf_counter() - started,
                filled=plan.filled if plan else 0.0,
                too_long=plan.too_long if plan else 0,
                unsuitable=plan.unsuitable if plan else 0,
                replaced=sum(slot.replaced for slot in loaded),
                epoch=plan.epoch if plan else 0.0,
                failure=failure,
                skipped=skipped,
            )
            if failure is not None:
                slots.close()
                return

    def _planned_slots(
        self, first: int, last: int, plans: "deque[StepPlan]", is_skipped: Callable[[int], bool] = _never
    ) -> Iterator[PlannedSlot]:
        """This rank's slots of all steps but skipped ones. Plans each step when it is reached, and appends the plan to
        `plans`."""
        for step in itertools.filterfalse(is_skipped, range(first, last + 1)):
            plan = self.planner.plan(step)
            plans.append(replace(plan, candidates=[], slot_items=[]))  # what `steps` needs, without the arrays
            for number in range(self.rank, self.recipe.data.slots, self.size):
                yield PlannedSlot(step, number, plan.slot(number))

    def _load(self, slots: Iterator[PlannedSlot]) -> Generator[LoadedSlot]:
        data = self.recipe.data
        if data.workers == 0:
            return _read_ahead(self.dataset, slots, data.prefetch, self.pin)
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_IteratorSampler(slots),
            num_workers=data.workers,
            prefetch_factor=data.prefetch,
            pin_memory=self.pin,
            multiprocessing_context="fork",
            worker_init_fn=partial(_start_worker, reports=self._reports, reading=self.dataset.reading),
            timeout=self.recipe.engine.step_timeout_s,
        )
        return _unpack_results(loader)


def dead_worker(error: Exception) -> RunError | None:
    """A one-line error for a loader worker that died, from what torch raises; None for any other error.

    A worker's death also shows as a broken connection, because the pack's bytes are fetched from the worker.
    """
    message = str(error).splitlines()[0].rstrip(". ") if str(error) else ""
    if isinstance(error, (ConnectionError, EOFError)):
        message = f"a DataLoader worker died ({type(error).__name__})"
    elif "DataLoader worker (pid" not in message:
        return None
    return RunError(
        f"{message}. A kill is mostly the kernel's, for memory: lower data.workers or data.prefetch. "
        f"The same command goes on from the last checkpoint"
    )


def as_run_error(error: Exception, step: int) -> UserError | RunError:
    """What a user reads where the data of a step cannot be loaded. It keeps nothing of `error` alive, whose traceback
    holds the loader's workers."""
    if isinstance(error, UserError | RunError):
        return error
    if (failure := dead_worker(error)) is not None:
        return failure
    message = " ".join(str(error).split())
    if "shared memory" in message or (isinstance(error, RuntimeError) and os.strerror(errno.ENOSPC) in message):
        return RunError(
            f"step {step}: {SHARED_MEMORY} is full, through which loader workers send packs; make it larger "
            "(docker run --shm-size=16g), lower data.workers or data.prefetch, or use data.workers=0, which needs none"
        )
    if shortage := describe_shortage(error):
        return RunError(f"step {step}: {shortage}")
    if "DataLoader timed out" in message:
        return RunError(
            f"step {step}: the loader workers sent no pack within engine.step_timeout_s: is the store up, and has this "
            "machine memory left?"
        )
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return RunError(f"step {step}: the loader failed: {type(error).__name__}: {message}{where}")


class SlotDataset(Dataset["PackBuffer | UserError | RunError"]):
    """Reads the planned samples of a slot and packs them. The result does not depend on the process."""

    def __init__(self, planner: Planner, reader: SampleReader) -> None:
        """The planner is only used for substitutes."""
        self.planner = planner
        self.reader = reader
        self.reading = CurrentReads()
        self._has_warned = False

    def __getitem__(self, planned: PlannedSlot) -> "PackBuffer | UserError | RunError":
        # Errors are returned: torch would replace an error that a worker raises by one with the worker's traceback.
        try:
            slot = self.read(planned)
            return PackBuffer.of(slot.batch, (slot.unreadable, slot.replaced), shared=True)
        except Exception as error:
            return as_run_error(error, planned.step)

    def read(self, planned: PlannedSlot) -> LoadedSlot:
        """The pack of one slot. Raises RunError if none of its samples can be read."""
        samples, unreadable, replaced = self._read_samples(planned.samples, use_cached=True)
        if not _are_packable(samples):
            self._warn_of_unused_latents(planned.step, samples)
            samples, unreadable, replaced = self._read_samples(planned.samples, use_cached=False)
        if not samples:
            raise RunError(
                f"step {planned.step}: no sample of slot {planned.number} can be read, nor a substitute; the last: "
                f"{unreadable[-1]}"
            )
        return LoadedSlot(pack(samples, len(planned.samples) - len(samples)), unreadable, replaced)

    def _warn_of_unused_latents(self, step: int, samples: Sequence[Sample]) -> None:
        """Warn once in each worker: a cache of the latents of one task alone saves no time."""
        if not self._has_warned:
            tasks = sorted({s.task for s in samples if any(image.latent is None for image in s.images.values())})
            text = "step %d: all images of a pack are encoded, because some of %s have no cached latent (docs/data.md)"
            log.warning(text, step, " and ".join(tasks))
        self._has_warned = True

    def _read_samples(
        self, planned: Sequence[SampleRef], use_cached: bool
    ) -> tuple[list[Sample], list[UnreadableSample], int]:
        """The samples that can be read, those that cannot, and how many of the former are substitutes.

        `use_cached` False leaves cached latents alone.
        """
        samples: list[Sample] = []
        unreadable: list[UnreadableSample] = []
        replaced = 0
        for sample, failed in self._read_each(planned, use_cached):
            unreadable += failed
            if sample is not None:
                samples.append(sample)
                replaced += bool(failed)
        return samples, unreadable, replaced

    def _read_each(
        self, planned: Sequence[SampleRef], use_cached: bool
    ) -> Iterator[tuple[Sample | None, list[UnreadableSample]]]:
        """Results of `_read_or_substitute` in order. Reads remote samples concurrently, to wait for many at once."""
        if all(is_local(sample.url) for sample in planned):
            yield from (self._read_or_substitute(sample, use_cached) for sample in planned)
            return
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            yield from pool.map(lambda sample: self._read_or_substitute(sample, use_cached), planned)

    def _read_or_substitute(self, planned: SampleRef, use_cached: bool) -> tuple[Sample | None, list[UnreadableSample]]:
        """The sample, or its first substitute that can be read, and what could not be read before it.

        Raises RunError if the object store does not answer for two of them: to try all substitutes of all samples
        would take hours, while all ranks wait.
        """
        unreadable: list[UnreadableSample] = []
        num_unreachable = 0
        attempted: SampleRef | None = planned
        for attempt in range(MAX_SUBSTITUTES + 1):
            if attempted is None:
                break
            self.reading.start(attempted)
            try:
                sample = self.reader.read(attempted, use_cached)
            except SampleError as error:
                shard = os.path.basename(urlsplit(attempted.url).path)
                unreadable.append(UnreadableSample(attempted.key, attempted.task, shard, str(error)))
                num_unreachable += error.unreachable
                if num_unreachable == 2:
                    raise RunError(f"{error}; nor could {planned.key} be read before it. Is the store up?") from None
                attempted = self.planner.substitute(planned, attempt)
                continue
            finally:
                self.reading.end()
            sample = replace(sample, source=self.planner.source_name(attempted))
            return sample, [replace(failed, replaced_by=attempted.key) for failed in unreadable]
        return None, unreadable


def _are_packable(samples: list[Sample]) -> bool:
    """Whether all images have latents or all have patches: a pack cannot mix cached and online encoding."""
    images = [image for sample in samples for image in sample.images.values()]
    return all(image.latent is not None for image in images) or all(image.patches is not None for image in images)


class _IteratorSampler(Sampler[PlannedSlot]):
    """Gives DataLoader the items of an iterator, in order."""

    def __init__(self, slots: Iterator[PlannedSlot]) -> None:
        self.slots = slots

    def __iter__(self) -> Iterator[PlannedSlot]:
        return self.slots


def _start_worker(number: int, reports: WorkerReports, reading: CurrentReads) -> None:
    """Make a worker ignore stop signals unless the trainer sends them, and say where it is when it is asked.

    A scheduler signals all processes of a job at once, but the trainer needs its workers until it has stopped.
    """
    # The trainer collects garbage at chosen steps only, which a fork inherits; each request to S3 leaves some.
    gc.enable()
    signals = (*STOP_SIGNALS, REPORT_SIGNAL)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    trainer = os.getppid()

    def watch() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_pid == trainer and received.si_signo != REPORT_SIGNAL:
                os._exit(0)
            if received.si_signo == REPORT_SIGNAL:
                reports.write(number, reading)

    threading.Thread(target=watch, name="stop-signals", daemon=True).start()
    reports.register()


def _unpack_results(results: Iterable[PackBuffer | UserError | RunError]) -> Generator[LoadedSlot]:
    """The slots that workers sent. Raises the errors among them."""
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield LoadedSlot(result.batch(), *result.extra)


def _read_ahead(dataset: SlotDataset, slots: Iterable[PlannedSlot], depth: int, pin: bool) -> Generator[LoadedSlot]:
    """Read slots in one background thread, up to `depth` ahead. Raises an error at the slot that caused it."""
    ready: queue.Queue[LoadedSlot | BaseException | None] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def put(result: LoadedSlot | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(result, timeout=0.2)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for planned in slots:
                slot = dataset.read(planned)
                put(replace(slot, batch=PackBuffer.of(slot.batch).pin_memory().batch()) if pin else slot)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again in the consumer's thread
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
