"""The rows that one step may take of one task: measured all at once, made into samples only when taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipelines.planner.costs import SampleCosts
from data_pipelines.planner.packing import Queue
from data_pipelines.planner.shuffle import WeightedInterleave
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.storage.object_store import shown


@dataclass(frozen=True)
class SampleRef:
    """One sample of a plan: where it is, which alternative is drawn, and what it costs at most."""

    key: str
    task: str
    url: str
    """Of its shard."""
    shard: str
    """sha256 of the tar in the manifest."""
    offset: int
    size: int
    crc32: int
    epoch: int
    alternative: int
    num_tokens: int
    """LLM tokens before any condition dropout."""
    num_visual: int
    """Visual tokens that the vision encoder sees."""
    max_tokens: int = 0
    """Cap of visual tokens per image that makes it fit a pack; 0 leaves it to the recipe."""
    phase: int = 0
    """Number of the phase that took it."""
    position: int = 0
    """Where its task stood."""


class Candidates:
    """Rows that a step may take of one task, in the order of their positions."""

    def __init__(self, task: str, phase: int, positions: np.ndarray, blend: WeightedInterleave, seed: int) -> None:
        """Raises UserError where a whole window is too long for any pack."""
        self.task, self.phase, self.positions = task, phase, positions
        self.blocks: list[tuple[int, SampleCosts]] = []
        self.block = np.zeros(len(positions), dtype=np.int64)
        self.row = np.zeros(len(positions), dtype=np.int64)
        self.refused = np.zeros(len(positions), dtype=bool)
        for which, epoch, columns, rows in blend.rows(positions):
            self.block[which], self.row[which] = len(self.blocks), rows
            self.refused[which] = columns.refused[rows]
            self.blocks.append((epoch, columns))
        for place in np.flatnonzero(self.refused).tolist():
            self.row[place] = self._stand_in(place, seed)

    def _gather(self, name: str) -> np.ndarray:
        """A column of all rows; its last dimension is that of the rows."""
        parts = [getattr(columns, name) for _, columns in self.blocks]
        out = np.empty((*parts[0].shape[:-1], len(self.row)), dtype=parts[0].dtype)
        for number, part in enumerate(parts):
            mine = self.block == number
            out[..., mine] = part[..., self.row[mine]]
        return out

    def lines(self, places: Sequence[int]) -> list[str]:
        """Key, task, alternative and epoch of some rows, for the digest."""
        lines, places_ = [""] * len(places), np.asarray(places, dtype=np.int64)
        for number, (epoch, columns) in enumerate(self.blocks):
            mine = np.flatnonzero(self.block[places_] == number)
            rows = self.row[places_[mine]]
            keys = columns.keys.take(pa.array(rows)).to_pylist()
            for at, key, alternative in zip(mine.tolist(), keys, columns.alternative[rows].tolist(), strict=True):
                lines[at] = f"{key} {self.task} {alternative} {epoch}"
        return lines

    def planned(self, place: int) -> SampleRef:
        """One row as the loader wants it."""
        epoch, columns = self.blocks[self.block[place]]
        return planned_row(columns, int(self.row[place]), self.task, self.phase, epoch, int(self.positions[place]))

    def queue(self) -> Queue:
        """What packing needs of all rows."""
        return Queue([0, len(self.row)], self._gather("sizes").tolist(), self._gather("cost").tolist())

    def _stand_in(self, place: int, seed: int) -> int:
        epoch, columns = self.blocks[self.block[place]]
        fit = np.flatnonzero(~columns.refused)
        if not len(fit):
            url, _ = columns.shards[columns.shard[self.row[place]]]
            raise UserError(
                f"{shown(url)}: no {self.task} sample near it fits a pack; raise data.pack_tokens (or its other caps), "
                "or lower the size of images"
            )
        key = columns.keys[int(self.row[place])].as_py()
        return int(fit[seed_of(seed, epoch, key, f"{self.task} stand-in") % len(fit)])


def planned_row(columns: SampleCosts, row: int, task: str, phase: int, epoch: int, position: int) -> SampleRef:
    """One row as the loader wants it."""
    url, sha256 = columns.shards[columns.shard[row]]
    return SampleRef(
        key=columns.keys[row].as_py(),
        task=task,
        url=url,
        shard=sha256,
        offset=int(columns.offset[row]),
        size=int(columns.size[row]),
        crc32=int(columns.crc32[row]),
        epoch=epoch,
        alternative=int(columns.alternative[row]),
        num_tokens=int(columns.tokens[row]),
        num_visual=int(columns.seen[row]),
        max_tokens=int(columns.shrunk[row]),
        phase=phase,
        position=position,
    )
