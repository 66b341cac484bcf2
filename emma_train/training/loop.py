"""The training loop: packed batches in, metrics, sample images and checkpoints out.

A step counts the tokens of each loss over all ranks, runs the micro-batches, clips, updates and averages. A step whose
gradient is not finite changes nothing. The loop is handed its batches and knows nothing of shards.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from emma_train.checkpoint import dcp
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.saver import SaveFailed, Saver
from emma_train.checkpoint.state import CheckpointState, checkpoint_state
from emma_train.config.schema import Recipe
from emma_train.engine.compiled import uncompiled
from emma_train.engine.rank_failure import is_lost_contact, report_failure
from emma_train.engine.stall_watch import StallWatch
from emma_train.engine.timeouts import Timeouts
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.export.content import content_hashes
from emma_train.metrics import record_metric, recording
from emma_train.model.autoencoder import Autoencoder
from emma_train.monitor.profiler import StepProfiler
from emma_train.objectives.loss import Counts, LossAccumulator, count
from emma_train.sequence.step_batches import StepBatches
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.sequence.validation_batches import ValidationBatches
from emma_train.stages.freeze import fingerprints
from emma_train.stages.stage import Stage
from emma_train.storage.paths import StoragePath
from emma_train.training.build import TrainingParts
from emma_train.training.checkpoint_meta import checkpoint_meta
from emma_train.training.environment import commit
from emma_train.training.forgetting_guard import find_losses, forgetting_error, with_better
from emma_train.training.forward import micro_loss
from emma_train.training.health import GarbageCollection
from emma_train.training.preemption import EXIT_PREEMPTED, StopRequest
from emma_train.training.replay import find_mismatches
from emma_train.training.resume_rule import check_resume, code_change
from emma_train.training.rewind import REWIND, Rewinds, read_rewinds
from emma_train.training.run_folder import RunFolder
from emma_train.training.schedule import learning_rate
from emma_train.training.skip_windows import after, is_inside, merged
from emma_train.training.skipped_steps import SkippedSteps
from emma_train.training.step_digests import StepDigests
from emma_train.training.step_log import StepLog
from emma_train.training.step_metrics import LOSS_SUM, StepMetrics
from emma_train.training.step_totals import local_totals
from emma_train.training.summary import finish_stage
from emma_train.training.time_ledger import TimeLedger
from emma_train.training.train_state import TrainState
from emma_train.training.unreadable_samples import UnreadableSamples
from emma_train.training.validation import Validation, averaged_weights

log = logging.getLogger(__name__)
LOST_CONTACT_S = 10.0
"""A save may take so long to end when other ranks cannot be reached."""


class Batches(Protocol):
    """The stream of packed batches."""

    def steps(self, first: int, last: int, is_skipped: Callable[[int], bool]) -> Iterator[StepBatches]: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def resume(self, state: dict[str, Any], config: Mapping[str, Any] | None = None) -> None: ...


class Trainer:
    """Trains one stage on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        world: World,
        parts: TrainingParts,
        autoencoder: Autoencoder,
        stream: Batches,
        generate_samples: Callable[[int], Path | None] | None = None,
        held_out: ValidationBatches | None = None,
    ) -> None:
        """`generate_samples(step)` writes samples and returns their folder; every rank calls it. `held_out`: what
        to validate on; None validates never."""
        self.recipe = recipe
        self.stage = stage
        self.world = world
        self.parts = parts
        self.engine = parts.engine
        self.autoencoder = autoencoder
        self.stream = stream
        self.generate_samples = generate_samples
        self._content = content_hashes(TextTokenizer(recipe.data.tokenizer), autoencoder.fingerprint)
        self.run = RunFolder(recipe)
        self.train_state = TrainState()
        self.frozen = fingerprints(self.engine.model)
        self.run_id: str | None = None
        self.parent = parts.parent
        local_folder = self.run.local_checkpoints if recipe.train.local_every else None
        self.saver = Saver(self.run.checkpoints, recipe.train, world, recipe.engine.timeout_s, local_folder)
        self._unreadable = UnreadableSamples(self.run, world, recipe.data)
        self._skipped = SkippedSteps(self.run, world.rank, recipe.train.max_skipped_steps)
        self._metrics = StepMetrics(recipe, stage, world)
        self._digests = StepDigests(self.run, world)
        self._losses_since_save: list[dict[str, float]] = []
        self._validated: dict[str, float] = {}
        """Values of the validation after the last step; empty where it had none."""
        self._validation = None
        if held_out is not None:
            self._validation = Validation(recipe, stage, world, parts, autoencoder, held_out)

    def resume(self, checkpoint: StoragePath) -> None:
        """Continue after `checkpoint`. Raises UserError where recipe and checkpoint contradict each other."""
        meta = folders.read_meta(checkpoint)
        assert meta is not None
        check_resume(self.recipe, meta["config"], str(checkpoint))
        self.stream.resume(meta["data"], meta["config"])
        log.info("loading %s", checkpoint)
        state = self._state()
        dcp.load_training(checkpoint, state)
        self.engine.sync_compute_weights()
        self.saver.resume_from(checkpoint, meta["step"], state)
        self.train_state = TrainState.from_checkpoint(meta["done"])
        self.run_id = meta.get("tracker_run")
        self.parent = meta.get("parent")
        self.frozen = fingerprints(self.engine.model)
        log.info("resumed %s", checkpoint)
        if change := code_change(meta, commit()):
            log.warning("%s: %s", checkpoint, change)

    def train(self, stop: StopRequest, watch: StallWatch, begun_unix: float | None = None) -> int:
        """Run the remaining steps. Returns the exit code: 0, or 75 after a signal and a checkpoint; or REWIND.
        `begun_unix`: when this start of the run began, for its ledger of time; None means now."""
        train, engine = self.recipe.train, self.recipe.engine
        if self.train_state.step >= train.steps:
            log.info("%s is complete at step %d", self.run.path, self.train_state.step)
            return 0
        stop.within_s = train.stop_within_s
        self._find_skip_windows()
        step_log = None
        if self.world.is_main:
            self.run.forget_unreadable(after=self.train_state.step)
            step_log = StepLog(self.recipe, self.run, self.train_state.step, self.run_id)
            self.run_id = step_log.run_id
        ledger = TimeLedger(
            self.run.path, self.train_state.step, begun_unix, lambda: self.saver.stall_s, self.world.is_main
        )
        self.engine.model.train()
        garbage = GarbageCollection(train.gc_every)
        profiler = StepProfiler(
            self.recipe.profile.steps if self.world.is_main else [], self.run.path, self.world.device
        )
        timeouts = Timeouts(self.world, self.engine.groups, engine.timeout_s, engine.step_timeout_s, watch)
        code = 1
        try:
            code = self._run_steps(stop, timeouts, garbage, profiler, ledger, step_log)
            if code == REWIND and not self.saver.close(train.stop_within_s):
                raise RunError(f"a save did not end within train.stop_within_s={train.stop_within_s}, so no rewind")
            return code
        except BaseException as error:
            if not self.saver.close(self._patience_s(error)):
                # The saving thread is stuck in storage, or waits for a rank that is gone. It would keep this process,
                # and so the other ranks, alive.
                failure = report_failure(error, self.world.rank, self.world.size) or error
                log.error("%s: %s", type(failure).__name__, failure)
                logging.shutdown()
                os._exit(code)
            raise
        finally:
            profiler.close(self.train_state.step)
            garbage.restore()
            timeouts.restore()
            ledger.close()
            if step_log:
                step_log.close(code)

    def _patience_s(self, error: BaseException) -> float:
        """How long a save that runs may take to end after an error."""
        if isinstance(error, SaveFailed):
            return 0
        patience_s = self.recipe.train.stop_within_s
        # Where ranks are gone, only the last request of a save can still succeed: it needs no other rank.
        return min(patience_s, LOST_CONTACT_S) if is_lost_contact(error) else patience_s

    def _run_steps(
        self,
        stop: StopRequest,
        timeouts: Timeouts,
        garbage: GarbageCollection,
        profiler: StepProfiler,
        ledger: TimeLedger,
        step_log: StepLog | None,
    ) -> int:
        """The steps of this run with their metrics, checkpoints and sample images. Returns the exit code."""
        train = self.recipe.train
        rewinds = Rewinds(self.run, self.world, self.recipe.health, self.train_state.step)
        for data in self.stream.steps(self.train_state.step + 1, train.steps, self._is_skipped):
            started = time.perf_counter()
            profiler.before(data.step)
            rewinds.note(data)
            is_last = data.step == train.steps
            validate_now = self._is_validation_due(data.step)
            log_now = data.step % train.log_every == 0 or data.step == 1 or is_last or validate_now
            ledger.add("data_wait", data.wait_s)
            with ledger.measure("step"):
                stopping, values = self._step(data, stop.asked, log_now)
            profiler.after(data.step)
            if mismatches := self._replay(data):
                rewinds.after_mismatch(data.step, mismatches)
                return REWIND
            if is_last:
                finish_stage(self.run, self.world, self.stage, self.train_state, self.parts, self.frozen)
            self._validated, forgotten = {}, []
            # Skip validation while shutting down.
            if validate_now and not stopping:
                with timeouts.relaxed(), ledger.measure("validation"):
                    forgotten = self._validate(data.step)
            give_up = bool(forgotten) and self.recipe.validate.guard.stop
            self._save_if_due(data.step, is_last or stopping or give_up, timeouts, ledger)
            self.train_state.seconds += time.perf_counter() - started + data.wait_s
            # Skip sample generation while shutting down.
            are_due = is_last or (train.sample_every and data.step % train.sample_every == 0 and not stopping)
            samples = self._generate(data.step, timeouts, ledger) if are_due else None
            if step_log:
                if values is not None:
                    stall_s = self.saver.pop_stall_s()
                    values |= {**self._validated, "checkpoint/stall_s": stall_s, "goodput": ledger.goodput()}
                step_log.after_step(data.step, values, samples, forgotten)
            ledger.after_step(data.step, is_logged=log_now)
            if give_up:
                raise forgetting_error(self.world.rank, data.step, forgotten)
            if values is not None and rewinds.after_logged(data.step, values):
                return REWIND
            garbage.after(data.step)
            timeouts.use_step_timeout(data.step)
            if stopping:
                return 0 if is_last else EXIT_PREEMPTED
        return 0

    def _find_skip_windows(self) -> None:
        """The steps that are not trained: of the recipe, of the checkpoint and of rewinds; those ahead of this run."""
        state = self.train_state
        windows = [[window.first, window.last] for window in self.recipe.health.skip_steps]
        windows += self.world.on_main(lambda: read_rewinds(self.run))
        for first, last in windows:
            if first <= state.step and not is_inside(first, state.skip_windows):
                log.warning(
                    "steps %d to %d cannot be skipped: the checkpoint has trained them", first, min(last, state.step)
                )
        state.skip_windows = merged([*state.skip_windows, *after(state.step, windows)])

    def _replay(self, data: StepBatches) -> list[str]:
        """A line for each rank that computes wrongly; empty in steps without a replay (health.replay). Comes after the
        step, when all ranks are known to have packs."""
        every = self.recipe.health.replay
        if not every or data.step % every or data.skipped:
            return []
        batch = data.packs[0].to(self.world.device)
        counts = count(data.packs[:1], self.stage.loss)

        def compute_loss() -> Tensor:
            sums = LossAccumulator(self.recipe.loss, counts, self.world.device)
            return micro_loss(self.engine.model, self.autoencoder, batch, self.recipe.flow, self.stage, sums)

        return find_mismatches(self.engine, self.world, compute_loss)

    def _is_skipped(self, step: int) -> bool:
        return is_inside(step, self.train_state.skip_windows)

    def _step(self, data: StepBatches, stop_requested: bool, log_now: bool) -> tuple[bool, dict[str, Any] | None]:
        """One optimizer step. Returns whether any rank was asked to stop, and the metrics where `log_now`."""
        started = time.perf_counter()
        local = local_totals(data, self.stage.loss, stop_requested, self.saver.local_status())
        waits_since = time.perf_counter()
        try:
            totals = local.over_ranks(self.world)
        except RuntimeError as error:
            if data.failure is not None:  # it took this rank longer than the others wait, so it has lost them
                raise data.failure from error
            raise
        waited_s = time.perf_counter() - waits_since
        self.saver.apply_status([totals.saves_ended, totals.saves_failed])
        self.train_state.add(totals)
        self._unreadable.check(data, totals, self.train_state)
        if data.skipped:
            log.info("step %d: skipped", data.step)
            self.train_state.untrained_steps += 1
            self.train_state.step = data.step
            self._digests.add(data, [])
            return totals.stop_requested > 0, None
        with recording(log_now) as recorded:
            self._accumulate(data, Counts(totals.loss_tokens))
            # Skipped steps do not count for the schedule.
            schedule_step = data.step - self.train_state.skipped_steps - self.train_state.untrained_steps
            lr = learning_rate(schedule_step, self.recipe.optimizer.lr, self.recipe.train.steps, self.recipe.schedule)
            self.saver.wait_for_staging()
            grad_norm = self.engine.step(lr)
        if math.isfinite(grad_norm):
            self._skipped.reset()
            if self.parts.ema is not None:
                self.parts.ema.update()
        else:
            self.train_state.skipped_steps += 1
            self._skipped.add(data, grad_norm)
        self.train_state.step = data.step
        self.train_state.too_long_samples += data.too_long
        self.train_state.unsuitable_samples += data.unsuitable
        self._metrics.after_step()
        if not log_now:
            return totals.stop_requested > 0, None
        line = self._metrics.line(data, totals, self.train_state, recorded, lr, grad_norm, started, waited_s)
        self._losses_since_save.append({k: v for k, v in line.items() if k.startswith("loss")})
        return totals.stop_requested > 0, line | self._digests.write()

    def _accumulate(self, data: StepBatches, counts: Counts) -> None:
        """Forward and backward of every micro-batch."""
        accumulator = LossAccumulator(self.recipe.loss, counts, self.world.device)
        noise: list[Tensor] = []
        for index, host_batch in enumerate(data.packs):
            batch = host_batch.to(self.world.device)
            loss = micro_loss(
                self.engine.model, self.autoencoder, batch, self.recipe.flow, self.stage, accumulator, noise
            )
            self.engine.accumulate(loss, last=index == len(data.packs) - 1)
        for task, loss_sum in zip(TASKS, accumulator.sums, strict=True):
            record_metric(f"{LOSS_SUM}{task}", loss_sum, "sum")
        self._digests.add(data, noise)

    def _is_validation_due(self, step: int) -> bool:
        """Whether there is a validation after `step`: the first, the last, and every validate.every-th."""
        every = self.recipe.validate.every
        return self._validation is not None and (step % every == 0 or step in (1, self.recipe.train.steps))

    def _validate(self, step: int) -> list[str]:
        """Measure on held-out data. Returns a line for each sign that understanding is forgotten."""
        assert self._validation is not None
        self.saver.wait_for_staging()
        values, state = self._validation.measure(), self.train_state
        if state.validation_digest != self._validation.digest:
            if state.best_validation:
                log.info("the held-out samples are other ones: the forgetting guard starts anew")
            state.validation_digest, state.best_validation = self._validation.digest, {}
        forgotten: list[str] = []
        if self.stage.loss == "tokens":
            forgotten = find_losses(values, state.best_validation, self.recipe.validate.guard)
            state.best_validation = with_better(values, state.best_validation, step)
            values["val/forgotten"] = len(forgotten)
        for line in forgotten:
            log.warning("step %d: understanding is being forgotten: %s", step, line)
        self._validated = values
        return forgotten

    def _save_if_due(self, step: int, is_end: bool, timeouts: Timeouts, ledger: TimeLedger) -> None:
        """Start a checkpoint, or a local one, where one is due after `step`; at the end, write a checkpoint."""
        if is_end or self.saver.due(step):
            with timeouts.relaxed(), ledger.measure("checkpoint"):
                self.save(wait=is_end)
        elif self.saver.local_due(step):
            with timeouts.relaxed(), ledger.measure("checkpoint"):
                self._digests.write()
                self.saver.start(self._state(), self._meta(), is_local=True)

    def save(self, wait: bool) -> None:
        """Start a checkpoint of the last finished step; where `wait`, return when it is written."""
        self._digests.write()
        self.saver.start(self._state(), self._meta())
        if wait:
            self.saver.finish_last(lambda: self.saver.start(self._state(), self._meta()))
        self._losses_since_save = []

    def _state(self) -> CheckpointState:
        """Tensors of a checkpoint on this rank."""
        return checkpoint_state(self.engine, self.parts.ema.averages if self.parts.ema else {})

    def _meta(self) -> dict[str, Any]:
        return checkpoint_meta(
            self.recipe,
            self.parts,
            self.train_state,
            self._losses_since_save,
            self._validated,
            data_state=self.stream.state(self.train_state.step),
            tracker_run=self.run_id,
            parent=self.parent,
            content=self._content,
            world_size=self.world.size,
        )

    def _generate(self, step: int, timeouts: Timeouts, ledger: TimeLedger) -> Path | None:
        """Sample images and answers with the averaged weights: their folder, where this rank writes them."""
        if self.generate_samples is None:
            return None
        self.saver.wait_for_staging()
        with timeouts.relaxed(), ledger.measure("samples"), uncompiled(), averaged_weights(self.engine, self.parts.ema):
            return self.generate_samples(step)
