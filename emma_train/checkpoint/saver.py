"""Saving while training goes on: one checkpoint at a time, copied to host memory, then written by a separate thread.

A failed save is logged and tried again while training goes on. Training stops before it could lose more work than the
recipe's interval between checkpoints. All ranks decide the same, because they learn of the outcome in the same step.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from emma_train.checkpoint.local_writer import LocalWriter
from emma_train.checkpoint.save_group import SaveGroup, one_line
from emma_train.checkpoint.staging import Staging
from emma_train.checkpoint.state import CheckpointState, local_part
from emma_train.checkpoint.writer import CheckpointWriter
from emma_train.config.schema import TrainConfig
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.storage.paths import StoragePath

log = logging.getLogger(__name__)
TRIES_PER_INTERVAL = 4
"""How often a failed save is tried again within an interval between checkpoints."""


@dataclass
class _Save:
    """One save that is running or has just ended."""

    step: int
    is_local: bool = False
    """Whether it is a local checkpoint, in folders of the nodes."""
    staged: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return "local checkpoint" if self.is_local else "checkpoint"

    @property
    def ended(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


class SaveFailed(RunError):
    """Checkpoints cannot be written, and further training could be lost."""


class Saver:
    """Writes the checkpoints of a run. Every rank has one and calls its methods at the same steps."""

    def __init__(
        self,
        checkpoints: StoragePath,
        config: TrainConfig,
        world: World,
        timeout_s: float,
        local_folder: Path | None = None,
    ) -> None:
        """`timeout_s`: longest time that training waits for a save to end. `local_folder`: that of this node for local
        checkpoints; None where the run makes none."""
        self._checkpoints = checkpoints
        self._config = config
        self._world = world
        self._timeout_s = timeout_s
        self._group = SaveGroup(world, timeout_s)
        self._writer = CheckpointWriter(checkpoints, config, self._group)
        self._local = None if local_folder is None else LocalWriter(local_folder, checkpoints, self._group)
        self._staging = Staging(world.device)
        self._running: _Save | None = None
        self._saved_step: int | None = None
        self._failing_since: int | None = None
        self._last_tried_step = 0
        self._last_step = 0
        """Of the last save of either kind that was begun."""
        self.stall_s = 0.0
        """Seconds so far that training has waited for saves."""
        self._popped_stall_s = 0.0

    def resume_from(self, checkpoint: StoragePath, step: int, state: CheckpointState) -> None:
        """Continue after a resume from the checkpoint of `step`."""
        self._saved_step = self._last_step = step
        self._writer.resume_from(checkpoint, state)

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step`."""
        failed_at = self._last_tried_step if self._failing_since is not None and self._running is None else None
        return is_due(step, self._config.save_every, failed_at)

    def local_due(self, step: int) -> bool:
        """Whether a local checkpoint should be written after `step`. It never waits for a save that is running."""
        if self._local is None or self._running is not None:
            return False
        return is_local_due(step, self._config.local_every, self._last_step)

    def start(self, state: CheckpointState, meta: Mapping[str, Any], is_local: bool = False) -> None:
        """Start to save; blocks until the save before has ended. The caller must not modify `meta` afterwards, nor any
        tensor of `state` until `wait_for_staging` has returned. Raises SaveFailed as `finish` does."""
        with self._count_stall():
            self._start(_Save(int(meta["step"]), is_local), state, meta)

    def _start(self, save: _Save, state: CheckpointState, meta: Mapping[str, Any]) -> None:
        if self._running is not None and not self._running.ended:
            log.warning(
                "the %s of step %d is still being written: training waits. Storage is too slow for %s",
                self._running.name,
                self._running.step,
                "train.local_folder" if self._running.is_local else f"train.save_every={self._config.save_every}",
            )
        self.finish()
        self._running, self._last_step = save, save.step
        if not save.is_local:
            self._last_tried_step = save.step
        self._staging.wait_for_compute()
        if not self._config.save_async:
            self._write(save, state, meta)
            self.finish()
        else:
            save.thread = threading.Thread(target=self._write, args=(save, state, meta), name="save", daemon=True)
            save.thread.start()

    def wait_for_staging(self) -> None:
        """Wait until the tensors that are being saved may change."""
        if self._running is not None and not self._running.staged.is_set():
            with self._count_stall():
                self._running.staged.wait()

    def pop_stall_s(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        stall_s, self._popped_stall_s = self.stall_s - self._popped_stall_s, self.stall_s
        return stall_s

    def local_status(self) -> list[float]:
        """[ended, failed] of this rank's part of the running save, as 0 or 1, for the sum over ranks in every step."""
        if self._running is None or not self._running.ended:
            return [0.0, 0.0]
        return [1.0, float(self._running.error is not None)]

    def apply_status(self, sums: Sequence[float]) -> None:
        """Take the sum of `local_status` over all ranks. Raises SaveFailed where saves have failed for too long."""
        ended, failed = sums
        if ended == self._world.size:
            self._conclude(failed > 0)

    def finish(self) -> None:
        """Wait for the running save. Raises SaveFailed if it does not end or saves have failed for too long."""
        if (save := self._running) is None:
            return
        if save.thread is not None:
            save.thread.join(self._timeout_s)
        late, failed = self._world.sum([float(not save.ended), float(save.error is not None)])
        if late:
            raise SaveFailed(
                f"the {save.name} of step {save.step} is not written after {self._timeout_s:.0f} s (engine.timeout_s): "
                f"{'train.local_folder' if save.is_local else self._checkpoints} may hang. {self._advice()}"
            )
        self._conclude(failed > 0)

    def finish_last(self, again: Callable[[], None]) -> None:
        """Wait for the last save of a run. Where it fails, `again` starts it once more. Raises SaveFailed."""
        with self._count_stall():
            self.finish()
        if self._failing_since is not None:
            again()
            with self._count_stall():
                self.finish()
        if self._failing_since is not None:
            raise SaveFailed(f"the last checkpoint could not be written. {self._advice()}")
        if self._local is not None:
            self._local.clear()

    def close(self, patience_s: float) -> bool:
        """Wait at most `patience_s` for a running save. Returns whether none is running any more."""
        if (save := self._running) is not None and save.thread is not None:
            save.thread.join(patience_s)
            return save.ended
        return True

    @contextmanager
    def _count_stall(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stall_s += time.perf_counter() - started

    def _conclude(self, failed: bool) -> None:
        save, self._running = self._running, None
        assert save is not None
        if save.is_local:
            if failed:
                log.warning("the local checkpoint of step %d failed (%s). Training goes on", save.step, save.error)
                self._group.renew()
            return
        if not failed:
            self._saved_step, self._failing_since = save.step, None
            return
        since = self._failing_since = save.step if self._failing_since is None else self._failing_since
        log.warning("the checkpoint of step %d failed (%s). Training goes on", save.step, save.error)
        if save.step - since >= self._config.save_every:
            raise SaveFailed(
                f"no checkpoint could be written since step {since} (last error: {save.error}); training stops before "
                f"more work could be lost. {self._advice()}"
            )
        self._group.renew()

    def _advice(self) -> str:
        last = "the beginning" if self._saved_step is None else f"step {self._saved_step}"
        return f"Repair the storage, then run the same command again: it goes on from {last}"

    def _write(self, save: _Save, state: CheckpointState, meta: Mapping[str, Any]) -> None:
        """Run one save on this rank, in a separate thread or in the training thread."""
        started = time.perf_counter()
        try:
            with self._staging.side_stream():
                trained = {**state.weights, **state.optimizer}
                threaded = save.thread is not None
                values = self._staging.copy(trained) if threaded else {n: local_part(t) for n, t in trained.items()}
                save.staged.set()
                if save.is_local:
                    assert self._local is not None
                    frozen = self._writer.ensure_frozen(state)
                    size = self._local.write(state, values, meta, frozen, after=self._saved_step)
                else:
                    size = self._writer.write(state, values, meta)
                    if self._local is not None:
                        self._local.remove_older()
            name, seconds = "a local checkpoint of " if save.is_local else "", time.perf_counter() - started
            log.info("saved %sstep %d: %.1f MB in %.1f s", name, save.step, size / 1e6, seconds)
        except (Exception, CheckpointException) as error:  # of storage or of another rank: training decides what to do
            save.error = one_line(error)
        finally:
            save.staged.set()


def is_due(step: int, every: int, failed_at: int | None) -> bool:
    """Whether a checkpoint is due after `step`: every `every` steps, and sooner after the save of step `failed_at` has
    failed."""
    return step % every == 0 or (failed_at is not None and step >= failed_at + max(1, every // TRIES_PER_INTERVAL))


def is_local_due(step: int, every: int, last_step: int) -> bool:
    """Whether a local checkpoint is due after `step`: where a multiple of `every` came after the last save, which may
    have been later than due. `every` 0 means never."""
    return every > 0 and step // every > last_step // every
