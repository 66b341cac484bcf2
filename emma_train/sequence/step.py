"""What the stream hands to the loop for one optimizer step."""

from dataclasses import dataclass

from emma_train.sequence.pack import PackedBatch


@dataclass(frozen=True)
class Bad:
    """A sample that could not be read, for bad_samples.jsonl."""

    key: str
    task: str
    shard: str
    reason: str


@dataclass(frozen=True)
class StepBatches:
    """What this rank computes in one optimizer step."""

    step: int
    packs: list[PackedBatch]
    digest: str
    """Of the samples of all ranks."""
    straggler: float
    """Planned cost of the heaviest slot over the mean."""
    bad: list[Bad]
    """Unreadable samples of this rank's packs; they are left out and counted."""
    wait_s: float
    """Time that the trainer waited for the packs."""
