"""What the data pipelines hand to the loop for validation: this rank's held-out packs."""

from dataclasses import dataclass, field

from emma_train.sequence.pack import PackedBatch


@dataclass(frozen=True)
class RankPacks:
    """Packs of one rank. Every rank has as many as the others, so that all run the same modules (contract 3)."""

    packs: list[PackedBatch] = field(default_factory=list)
    num_counted: int = 0
    """The first so many count; the rest repeats packs that another rank counts."""


@dataclass(frozen=True)
class ValidationBatches:
    """Held-out samples and questions of this rank."""

    samples: RankPacks
    """For the losses."""
    questions: RankPacks
    """I2T samples whose answers must match exactly."""
    digest: str
    """Of the samples and questions of all ranks: values of other samples cannot be compared."""
