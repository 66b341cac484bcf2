"""Counts of one optimizer step that all ranks add up before its first forward pass, in one all-reduce."""

from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from emma_train.config.mix import TASK_NAMES
from emma_train.engine.world import World
from emma_train.objectives.loss import count
from emma_train.sequence.step_batches import StepBatches

IN_PACKS = {"counted_in_packs": True}
"""Metadata of a field that counts something in a rank's packs. Ranks that share a pack (sequence parallelism) all count
the same, so the sum over ranks is divided by their number, rounded up."""


@dataclass(frozen=True)
class StepTotals:
    """Counts of one rank, or their sum over all ranks. A new field needs no other change here: numbers travel by field
    name, and those of a dict by key; every rank has the same keys."""

    loss_tokens: dict[str, int] = field(metadata=IN_PACKS)
    """Tokens of each loss, by task (images in router tuning)."""
    samples: dict[str, int] = field(metadata=IN_PACKS)
    """By task."""
    tokens: int = field(metadata=IN_PACKS)
    """Tokens of the decoder."""
    unreadable: int = field(metadata=IN_PACKS)
    """Samples that could not be read, failed substitutes included."""
    replaced: int = field(metadata=IN_PACKS)
    """Planned samples for which a substitute was read."""
    dropped: int = field(metadata=IN_PACKS)
    """Planned samples for which nothing could be read."""
    failed: int
    """Ranks that have no packs and cannot continue."""
    stop_requested: int
    """Ranks that were asked to stop."""
    saves_ended: int
    """Ranks whose part of the running save has ended."""
    saves_failed: int
    """Ranks whose part of the running save has failed."""

    def over_ranks(self, world: World) -> "StepTotals":
        """The sum over all ranks; every rank calls it."""
        return self.from_vector(world.sum(self.to_vector()), world.sp_size)

    def to_vector(self) -> list[float]:
        """All numbers, in the order of `_numbers`."""
        return [float(number) for _, _, number in self._numbers()]

    def from_vector(self, sums: Sequence[float], sp_size: int) -> "StepTotals":
        """Totals of the same fields and keys with the numbers of `sums`, each a sum over ranks."""
        values: dict[str, Any] = asdict(self)
        for (field_, key, _), total in zip(self._numbers(), sums, strict=True):
            number = int(-(-total // sp_size) if field_.metadata.get("counted_in_packs") else total)
            if key is None:
                values[field_.name] = number
            else:
                values[field_.name][key] = number
        return replace(self, **values)

    def _numbers(self) -> Iterator[tuple[Field, str | None, int]]:
        """(field, key of a dict or None, number) of every number."""
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, dict):
                for key in sorted(value):
                    yield field_, key, value[key]
            else:
                yield field_, None, value


def local_totals(data: StepBatches, loss: str, stop_requested: bool, save_status: Sequence[float]) -> StepTotals:
    """Counts of this rank; `loss` is the stage's (tokens or router), `save_status` is Saver.local_status()."""
    save_ended, save_failed = save_status
    return StepTotals(
        loss_tokens=dict(count(data.packs, loss).by_task),
        samples={task: sum(batch.tasks.count(task) for batch in data.packs) for task in TASK_NAMES},
        tokens=sum(batch.num_tokens for batch in data.packs),
        unreadable=len(data.unreadable),
        replaced=data.replaced,
        dropped=data.dropped,
        failed=data.failure is not None,
        stop_requested=stop_requested,
        saves_ended=int(save_ended),
        saves_failed=int(save_failed),
    )
