"""The training loop: packed batches in, metrics, sample images and checkpoints out.

A step: count the tokens of each loss over all ranks, run the micro-batches, clip, update, average. A step whose
gradient is not finite moves nothing at all. The loop is handed its batches and knows nothing of shards.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from emma_train.checkpoint import dcp as store
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.saver import SaveFailed, Saver
from emma_train.checkpoint.state import State, state_of
from emma_train.config import config_hash
from emma_train.config.load import as_dict
from emma_train.config.schema import Recipe
from emma_train.engine.compiled import num_graphs, uncompiled
from emma_train.engine.timeouts import Timeouts
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.flops.work import step_mfu
from emma_train.model.autoencoder import Autoencoder
from emma_train.monitor.progress import Progress
from emma_train.monitor.trackers import Trackers, make_trackers
from emma_train.monitor.usage import memory_gib
from emma_train.objectives.loss import Counts, LossAccumulator, count, losses
from emma_train.sequence.step_batches import StepBatches, UnreadableSample
from emma_train.stages.freeze import changed, fingerprints
from emma_train.stages.stage import Stage
from emma_train.storage.paths import StoragePath
from emma_train.training.build import TrainingParts
from emma_train.training.forward import micro_loss
from emma_train.training.health import GarbageCollection, SpikeWatch
from emma_train.training.preemption import EXIT_PREEMPTED, StopRequest
from emma_train.training.resume_rule import check_resume
from emma_train.training.run_folder import RunFolder
from emma_train.training.schedule import learning_rate

log = logging.getLogger(__name__)
TASKS = ("i2t", "t2i", "it2i")


class Batches(Protocol):
    """The stream, as the loop sees it."""

    def steps(self, first: int, last: int) -> Iterator[StepBatches]: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def resume(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """Counters that a checkpoint carries."""

    step: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    bad_samples: int = 0
    """That could not be read, spares too."""
    replaced_samples: int = 0
    """Places of the plan that a spare took."""
    left_out_samples: int = 0
    """Places of the plan that stayed empty."""
    refused_samples: int = 0
    """Too long for any pack; others stood in for them."""
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))


class Trainer:
    """One stage on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        world: World,
        built: TrainingParts,
        autoencoder: Autoencoder,
        stream: Batches,
        generate_samples: Callable[[int], list[Path]] | None = None,
    ) -> None:
        """`draw_samples(step)` makes sample images; every rank calls it."""
        self.recipe, self.stage, self.world, self.built = recipe, stage, world, built
        self.autoencoder, self.stream, self.generate_samples = autoencoder, stream, generate_samples
        self.engine, self.run = built.engine, RunFolder(recipe)
        self.done = TrainState()
        self.frozen = fingerprints(self.engine.model)
        self.run_id: str | None = None
        self.parent = built.parent
        self.saver = Saver(self.run.checkpoints, recipe.train, world, recipe.engine.timeout_s)
        self._since_save: list[dict[str, Any]] = []
        self._nonfinite_in_a_row = 0
        self._spikes = SpikeWatch()
        self._graphs: int | None = None

    def resume(self, checkpoint: StoragePath) -> None:
        """Go on after `checkpoint`. Raises UserError where recipe and checkpoint contradict each other."""
        meta = folders.read_meta(checkpoint)
        assert meta is not None
        check_resume(self.recipe, meta["config"], str(checkpoint))
        self.stream.resume(meta["data"])
        state = self._state()
        store.load_training(checkpoint, state)
        self.engine.sync_compute_weights()
        self.saver.resume_from(checkpoint, meta["step"], state)
        self.done = TrainState(**meta["done"])
        self.run_id, self.parent = meta.get("tracker_run"), meta.get("parent")
        self.frozen = fingerprints(self.engine.model)
        log.info("resumed %s", checkpoint)

    def train(self, stop: StopRequest) -> int:
        """Run the remaining steps. Returns the exit code: 0, or 75 after a signal and a checkpoint."""
        total, cadence = self.recipe.train.steps, self.recipe.train
        if self.done.step >= total:
            log.info("%s is complete at step %d", self.run.path, self.done.step)
            return 0
        main = self.world.is_main
        if main:
            self.run.forget_bad(after=self.done.step)
        trackers = self._trackers() if main else None
        progress = Progress(self.recipe.stage.name, total, self.done.step) if main else None
        self.run_id = trackers.run_id if trackers else self.run_id
        code, stop.within_s = 1, cadence.stop_within_s
        self.engine.model.train()
        garbage = GarbageCollection(cadence.gc_every)
        limits = Timeouts(
            self.world, self.engine.groups, self.recipe.engine.timeout_s, self.recipe.engine.step_timeout_s
        )
        try:
            for data in self.stream.steps(self.done.step + 1, total):
                started = time.perf_counter()
                log_now = data.step % cadence.log_every == 0 or data.step in (1, total)
                asked, values = self._step(data, stop.asked, log_now)
                last = data.step == total or asked
                if data.step == total:
                    self._verify()
                if values is not None:
                    self._since_save.append(values)
                if self.saver.due(data.step) or last:
                    with limits.relaxed():
                        self.save(wait=last)
                self.done.seconds += time.perf_counter() - started + data.wait_s
                # Who is asked to stop has no time for images.
                drawn = cadence.sample_every and data.step % cadence.sample_every == 0 and not asked
                drawn = drawn or data.step == total
                with limits.relaxed():
                    images = self._draw(data.step) if drawn else []
                if trackers and values is not None:
                    stall = {"checkpoint/stall_s": self.saver.pop_stall_s()}
                    trackers.log(data.step, {**values, **stall, "time_unix": time.time()})
                    trackers.images(data.step, "samples", images, [p.stem for p in images])
                if progress:
                    progress.update(data.step, values)
                garbage.after(data.step)
                limits.use_step_timeout()
                if asked:
                    code = EXIT_PREEMPTED if data.step < total else 0
                    return code
            code = 0
            return code
        except BaseException as error:
            if not self.saver.close(0 if isinstance(error, SaveFailed) else cadence.stop_within_s):
                # A thread that storage does not let go of would keep the process, and the other ranks, for good.
                log.error("%s: %s", type(error).__name__, error)
                logging.shutdown()
                os._exit(code)
            raise
        finally:
            garbage.restore()
            limits.restore()
            if progress:
                progress.close()
            if trackers:
                trackers.finish(code)

    def _step(self, data: StepBatches, stop_asked: bool, log_now: bool) -> tuple[bool, dict[str, Any] | None]:
        """One optimizer step. Returns whether any rank was asked to stop, and the metrics where they are due."""
        started = time.perf_counter()
        mine = count(data.packs, self.stage.loss)
        seen = [sum(b.tasks.count(task) for b in data.packs) for task in TASKS]
        tokens = sum(b.num_tokens for b in data.packs)
        trouble = [len(data.unreadable), data.replaced, data.dropped, data.failure is not None]
        facts = [mine.i2t, mine.t2i, mine.it2i, *seen, tokens, float(stop_asked), *trouble, *self.saver.local_status()]
        shared = self.world.sum(facts)
        shared[:7] = self.world.of_packs(shared[:7])
        shared[8:11] = self.world.of_packs(shared[8:11])
        counts = Counts(*(int(n) for n in shared[:3]))
        self.saver.apply_status(shared[12:])
        self._note_bad(data, *(int(n) for n in shared[8:12]))

        accumulator = LossAccumulator(self.recipe.loss, counts, self.world.device)
        for index, host in enumerate(data.packs):
            batch = host.to(self.world.device)
            loss = micro_loss(self.engine.model, self.autoencoder, batch, self.recipe.flow, self.stage, accumulator)
            self.engine.accumulate(loss, last=index == len(data.packs) - 1)
        lr = learning_rate(
            data.step - self.done.skipped_steps, self.recipe.optimizer.lr, self.recipe.train.steps, self.recipe.schedule
        )
        self.saver.wait_for_staging()
        norm = self.engine.step(lr)
        if math.isfinite(norm):
            self._nonfinite_in_a_row = 0
            if self.built.ema is not None:
                self.built.ema.update()
        else:
            self._skip(data, norm)
        self.done.step = data.step
        self._graphs = num_graphs() if self._graphs is None else self._graphs
        self.done.refused_samples += data.too_long
        for task, number in zip(TASKS, shared[3:6], strict=True):
            self.done.seen[task] += int(number)
        if not log_now:
            return shared[7] > 0, None
        images = sum(len(b.stem) for b in data.packs)
        *sums, stem, seen_images = self.world.sum([*accumulator.sums.tolist(), float(accumulator.stem), images])
        sums = [value / self.world.sp_size for value in sums]
        step_s = time.perf_counter() - started + data.wait_s
        found = losses(sums, counts, self.recipe.loss)
        if spike := self._spikes.note(found["loss"]):
            log.warning("step %d: %s", data.step, spike)
        values: dict[str, Any] = {
            "step": data.step,
            "stage": self.recipe.stage.name,
            **found,
            "lr": lr,
            "grad_norm": norm,
            **{f"samples/{task}": int(n) for task, n in zip(TASKS, shared[3:6], strict=True)},
            "tokens/total": int(shared[6]),
            "tokens/padding": 0,
            "tokens_per_s": shared[6] / step_s,
            "memory_gib": memory_gib(self.world.device),
            "step_s": step_s,
            "data/wait_s": data.wait_s,
            "data/digest": data.digest,
            "data/straggler": data.straggler,
            "data/skipped": self.done.left_out_samples,
            "data/replaced": self.done.replaced_samples,
            "data/refused": self.done.refused_samples,
            "data/fill": data.filled,
            "steps/skipped": self.done.skipped_steps,
        }
        if self.stage.stem_expert and seen_images:
            values["vision/stem_share"] = stem / seen_images
        if self.recipe.engine.compile:
            values["compile/recompiles"] = num_graphs() - self._graphs
        share = step_mfu(
            self.recipe.model,
            self.stage.trainable,
            data.packs,
            step_s,
            self.world.device,
            num_cards=self.world.sp_size,
            encoder_only=self.stage.loss == "router",
        )
        return shared[7] > 0, values if share is None else {**values, "mfu": share}

    def save(self, wait: bool) -> None:
        """Start a checkpoint of the last finished step; where `wait`, return when it is written."""
        self.saver.start(self._state(), self._meta())
        if wait:
            self.saver.finish_last(lambda: self.saver.start(self._state(), self._meta()))
        self._since_save = []

    def _state(self) -> State:
        """What a checkpoint holds of this rank."""
        return state_of(self.engine, self.built.ema.averages if self.built.ema else {})

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself and of how to go on."""
        names = {key for values in self._since_save for key in values if key.startswith("loss")}
        logged = {key: [values[key] for values in self._since_save if key in values] for key in names}
        return {
            "step": self.done.step,
            "stage": self.recipe.stage.name,
            "trainable": self.built.trainable,
            "config_hash": config_hash(self.recipe),
            "config": as_dict(self.recipe),
            "ema_decay": self.recipe.ema.decay,
            "done": asdict(self.done),
            "metrics": {key: sum(values) / len(values) for key, values in sorted(logged.items())},
            "data": self.stream.state(self.done.step),
            "tracker_run": self.run_id,
            "parent": self.parent,
            "world_size": self.world.size,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _draw(self, step: int) -> list[Path]:
        """Sample images with the averaged weights."""
        if self.generate_samples is None:
            return []
        self.saver.wait_for_staging()
        with uncompiled(), self.built.ema.swapped_in() if self.built.ema else nullcontext():
            self.engine.sync_compute_weights()
            images = self.generate_samples(step)
        self.engine.sync_compute_weights()
        return images

    def _trackers(self) -> Trackers:
        return make_trackers(
            self.recipe.tracker.kind,
            self.run.path,
            as_dict(self.recipe),
            self.done.step,
            self.run_id,
            project=self.recipe.tracker.project,
            group=Path(self.recipe.run.root).name,
        )

    def _note_bad(self, data: StepBatches, bad: int, replaced: int, left_out: int, failed: int) -> None:
        """Count and write out what could not be read on all ranks. Where one cannot go on, or the limit is passed, all
        stop at this step: they have all seen the same sums."""
        self.done.bad_samples += bad
        self.done.replaced_samples += replaced
        self.done.left_out_samples += left_out
        found: list[UnreadableSample] = []
        if bad:
            mine = data.unreadable if self.world.rank % self.world.sp_size == 0 else []
            found = [item for of_rank in self.world.gather(mine) for item in of_rank]
            if self.world.is_main:
                self.run.append_bad(data.step, found)
            for item in found[:3]:
                instead = f"{item.replaced_by} is read instead" if item.replaced_by else "it is left out"
                log.warning("step %d: %s cannot be read (%s); %s", data.step, item.key, item.reason, instead)
        if failed:
            failures = [failure for failure in self.world.gather(data.failure) if failure is not None]
            raise failures[0]
        if self.done.bad_samples > self.recipe.data.max_bad_samples:
            last = "; ".join(f"{b.key} ({b.task}, {b.shard}: {b.reason})" for b in found[:10])
            raise RunError(
                f"{self.done.bad_samples} samples could not be read by step {data.step}, more than "
                f"data.max_bad_samples={self.recipe.data.max_bad_samples}: {last}. {self.run.bad_samples} lists them "
                f"all; `emma-data check` finds what else is broken"
            )

    def _skip(self, data: StepBatches, norm: float) -> None:
        """A gradient that is not finite moves neither weights, averages nor schedule. Every rank writes down its
        samples."""
        self.done.skipped_steps += 1
        self._nonfinite_in_a_row += 1
        keys = [key for b in data.packs for key in b.keys]
        self.run.append_skipped(data.step, self.world.rank, norm, keys)
        log.warning(
            "step %d: gradient norm is %s, step skipped; keys on this rank: %s", data.step, norm, " ".join(keys[:8])
        )
        if self._nonfinite_in_a_row >= self.recipe.train.max_skipped_steps:
            raise RuntimeError(
                f"{self._nonfinite_in_a_row} steps in a row had a gradient that is not finite "
                f"(train.max_skipped_steps); {self.run.skipped_steps} lists their samples; of the last on rank "
                f"{self.world.rank}: {' '.join(keys[:8])}"
            )

    def _verify(self) -> None:
        """Before the last checkpoint: prove that frozen parameters did not move, on all ranks, and write the
        summary."""
        self.engine.reshard()
        moved = changed(self.engine.model, self.frozen)
        anywhere = self.world.sum([len(moved)])[0]
        if self.world.is_main:
            self.run.write_summary(
                {
                    "stage": self.recipe.stage.name,
                    "title": self.stage.title,
                    "steps": self.done.step,
                    "seconds": round(self.done.seconds, 1),
                    "samples": self.done.seen,
                    "bad_samples": self.done.bad_samples,
                    "replaced_samples": self.done.replaced_samples,
                    "left_out_samples": self.done.left_out_samples,
                    "skipped_steps": self.done.skipped_steps,
                    "parameters": self.built.num_parameters,
                    "trainable": self.built.trainable,
                    "trainable_parameters": sum(self.built.trainable.values()),
                    "frozen_tensors": len(self.frozen),
                    "frozen_verified": anywhere == 0,
                }
            )
        if anywhere:
            raise RuntimeError(
                f"frozen parameters have changed, which is a bug: {', '.join(moved[:5]) or 'on another rank'}"
            )
