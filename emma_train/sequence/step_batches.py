"""What the stream hands to the loop for one optimizer step."""

from dataclasses import dataclass, field

from emma_train.sequence.pack import PackedBatch


@dataclass(frozen=True)
class UnreadableSample:
    """A sample that could not be read, for bad_samples.jsonl."""

    key: str
    task: str
    shard: str
    reason: str
    replaced_by: str | None = None
    """Key of the substitute that was read instead; None where there was none."""


@dataclass(frozen=True)
class StepBatches:
    """What this rank computes in one optimizer step."""

    step: int
    packs: list[PackedBatch]
    digest: str
    """Of the samples of all ranks."""
    straggler: float
    """Planned cost of the heaviest slot over the mean."""
    unreadable: list[UnreadableSample]
    """Samples that could not be read for this rank's packs, failed substitutes too."""
    wait_s: float
    """Time that the trainer waited for the packs."""
    filled: float = 0.0
    """Planned LLM tokens of all slots over the room for them."""
    too_long: int = 0
    """Samples of all slots that were too long for any pack; each was replaced by another of its window."""
    unsuitable: int = 0
    """Samples of all slots with an image below min_side or beyond max_aspect; each was replaced likewise."""
    replaced: int = 0
    """Planned samples of this rank that a substitute replaces because they could not be read."""
    epoch: float = 0.0
    """Epochs that the run has read of its most read pool of samples; in a phase's own sources."""
    skipped: bool = False
    """The step is not trained: it has no packs."""
    failure: Exception | None = field(default=None, compare=False)
    """Why this rank has no packs and cannot go on. The loop tells all ranks, so that they stop together."""

    @property
    def dropped(self) -> int:
        """Planned samples of this rank that are missing from its packs: neither they nor a substitute could be read."""
        return sum(batch.num_dropped for batch in self.packs)
