"""Steps whose gradient is not finite: they change nothing, are listed, and too many in a row stop the run."""

import logging

from emma_train.checkpoint import folder as folders
from emma_train.errors import RankFailure, RunError
from emma_train.sequence.step_batches import StepBatches
from emma_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class SkippedSteps:
    """Writes skipped_steps.jsonl and enforces train.max_skipped_steps."""

    def __init__(self, run: RunFolder, rank: int, max_in_a_row: int) -> None:
        self._run = run
        self._rank = rank
        self._max_in_a_row = max_in_a_row
        self._num_in_a_row = 0

    def reset(self) -> None:
        """A step had a finite gradient."""
        self._num_in_a_row = 0

    def add(self, data: StepBatches, grad_norm: float) -> None:
        """List this rank's samples of a skipped step. At `max_in_a_row` such steps in a row, raises RunError on the
        main rank and RankFailure on the others."""
        self._num_in_a_row += 1
        keys = [key for batch in data.packs for key in batch.keys]
        shown = " ".join(keys[:8])
        self._run.append_skipped(data.step, self._rank, grad_norm, keys)
        log.warning("step %d: gradient norm is %s, step skipped; keys on this rank: %s", data.step, grad_norm, shown)
        if self._num_in_a_row >= self._max_in_a_row:
            raise self._diverged(shown)

    def _diverged(self, shown: str) -> RunError | RankFailure:
        """The error that ends the run: with a text on the main rank only, because every rank meets it."""
        if self._rank:
            return RankFailure()
        newest = folders.newest_checkpoint(self._run.checkpoints)
        start = f"from {newest.name}" if newest else "from the beginning, for there is no checkpoint yet"
        return RunError(
            f"training has diverged: {self._num_in_a_row} steps in a row had a gradient that is not finite "
            f"(train.max_skipped_steps). The same command goes on {start}: lower optimizer.lr or "
            "optimizer.max_grad_norm (with resume.allow=[optimizer]), or look at the data: "
            f"{self._run.skipped_steps} lists the samples; of the last step: {shown}"
        )
