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
    """Key of the spare that was read instead; None where none could be."""


@dataclass(frozen=True)
class StepBatches:
    """What this rank computes in one optimizer step."""

    step: int
    packs: list[PackedBatch]
    digest: str
    """Of the samples of all ranks."""
    straggler: float
    """Planned cost of the heaviest slot over the mean."""
    bad: list[UnreadableSample]
    """Samples that could not be read for this rank's packs, spares too."""
    wait_s: float
    """Time that the trainer waited for the packs."""
    filled: float = 0.0
    """Planned LLM tokens of all slots over the room for them."""
    refused: int = 0
    """Samples of all slots that were too long for any pack; others stand in for them."""
    replaced: int = 0
    """Planned samples of this rank in whose place a spare was read; others that are bad are left out."""
    failure: Exception | None = field(default=None, compare=False)
    """Why this rank has no packs and cannot go on. The loop tells all ranks, so that they stop together."""

    @property
    def left_out(self) -> int:
        """Planned samples of this rank for which nothing could be read."""
        return sum(batch.num_skipped for batch in self.packs)
