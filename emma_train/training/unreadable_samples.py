"""What happens at samples that cannot be read: they are listed, and too many of them stop the run."""

import logging

from emma_train.config.schema import DataConfig
from emma_train.engine.world import World
from emma_train.errors import RunError
from emma_train.sequence.step_batches import StepBatches, UnreadableSample
from emma_train.training.run_folder import RunFolder
from emma_train.training.step_totals import StepTotals
from emma_train.training.train_state import TrainState

log = logging.getLogger(__name__)


def unreadable_limit(config: DataConfig, num_seen: int) -> float:
    """Most unreadable samples that a run may have after `num_seen` samples: the larger one of both limits."""
    return max(config.max_bad_samples, config.max_bad_share * num_seen)


class UnreadableSamples:
    """Writes bad_samples.jsonl and enforces data.max_bad_samples and data.max_bad_share. Every rank calls `check` at
    every step."""

    def __init__(self, run: RunFolder, world: World, config: DataConfig) -> None:
        self._run = run
        self._world = world
        self._config = config

    def check(self, data: StepBatches, totals: StepTotals, state: TrainState) -> None:
        """List the unreadable samples of a step of all ranks; `state` counts this step already.

        Raises the error of a rank that cannot continue, or RunError where both limits are passed: on every rank at the
        same step, since `totals` and `state` are the same everywhere.
        """
        samples = self._list(data) if totals.unreadable else []
        if totals.failed:
            raise next(failure for failure in self._world.gather(data.failure) if failure is not None)
        num_bad, num_seen = state.unreadable_samples, sum(state.seen.values())
        if num_bad > unreadable_limit(self._config, num_seen):
            last = "; ".join(f"{s.key} ({s.task}, {s.shard}: {s.reason})" for s in samples[:10])
            raise RunError(
                f"{num_bad} samples could not be read by step {data.step}, more than data.max_bad_samples="
                f"{self._config.max_bad_samples} and than data.max_bad_share={self._config.max_bad_share} of "
                f"{num_seen}: {last}. {self._run.bad_samples} lists them all; `emma-data check` finds what else is "
                "broken"
            )

    def _list(self, data: StepBatches) -> list[UnreadableSample]:
        """Write and log the unreadable samples of all ranks."""
        # Ranks that share a pack all report the same samples.
        local = data.unreadable if self._world.rank % self._world.sp_size == 0 else []
        samples = [sample for of_rank in self._world.gather(local) for sample in of_rank]
        if self._world.is_main:
            self._run.append_unreadable(data.step, samples)
        for sample in samples[:3]:
            outcome = f"{sample.replaced_by} replaces it" if sample.replaced_by else "it is dropped"
            log.warning("step %d: %s cannot be read (%s); %s", data.step, sample.key, sample.reason, outcome)
        return samples
