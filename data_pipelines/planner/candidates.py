"""Candidates: the samples of one task that a step may take. They are arrays; only taken ones become SampleRefs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from data_pipelines.planner.costs import SampleCosts
from data_pipelines.planner.packing import Queue
from data_pipelines.planner.shuffle import WeightedInterleave
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.storage.urls import display_url


@dataclass(frozen=True)
class SampleRef:
    """One sample of a plan: where its bytes are, which alternative is used, and what it costs at most."""

    key: str
    task: str
    url: str
    """URL or path of the shard."""
    shard: str
    """sha256 of the shard, from the manifest."""
    offset: int
    """First byte of the record in the shard."""
    size: int
    """Bytes of the record."""
    crc32: int
    """Checksum of these bytes."""
    epoch: int
    alternative: int
    """Index in the record's list of alternatives of the task."""
    num_tokens: int
    """LLM tokens before any condition dropout."""
    num_visual: int
    """Visual tokens that the vision encoder sees."""
    max_tokens: int = 0
    """Limit of visual tokens per image that makes the sample fit a pack; 0 uses the recipe's limit."""
    phase: int = 0
    """Index of the phase whose step takes the sample."""
    pool: int = 0
    """Index of its pool in the stream of its task."""
    position: int = 0
    """Position in the pool."""
    stem: int | None = None
    """1 for STEM, 0 for general, -1 for neither, by the tags of the index; None takes the tags of the record."""
    caption: str | None = None
    """Text of the alternative where that is a caption of a selection, which the record does not have."""
    folder: str = ""
    """Folder of its source."""


class Candidates:
    """The samples at N positions of one task's stream, in the order of the positions."""

    def __init__(
        self,
        task: str,
        phase: int,
        positions: np.ndarray,
        interleave: WeightedInterleave,
        offsets: tuple[int, ...],
        seed: int,
    ) -> None:
        """A sample that is too long for any pack, or has an unsuitable image, is replaced by another of its shuffle
        window. `offsets` are those of the pools (shuffle.py).

        Raises UserError if no sample of a window can be used.
        """
        self.task = task
        self.phase = phase
        self.positions = positions
        self._locate = partial(interleave.locate, offsets=offsets)
        self.windows: list[tuple[int, SampleCosts]] = []
        """Epoch and samples of every shuffle window that the positions fall into."""
        self.window_index = np.zeros(len(positions), dtype=np.int64)
        """For each candidate, its window in `windows`."""
        self.row = np.zeros(len(positions), dtype=np.int64)
        """For each candidate, its row in the window."""
        self.too_long = np.zeros(len(positions), dtype=bool)
        """Whether the sample at the position was too long, so that another one replaces it."""
        self.unsuitable = np.zeros(len(positions), dtype=bool)
        """Whether an image of the sample was too small or too elongated, so that another sample replaces it."""
        for indices, epoch, costs, rows in interleave.rows(positions, offsets):
            self.window_index[indices] = len(self.windows)
            self.row[indices] = rows
            self.too_long[indices] = costs.too_long[rows]
            self.unsuitable[indices] = costs.unsuitable[rows]
            self.windows.append((epoch, costs))
        for index in np.flatnonzero(self.too_long | self.unsuitable).tolist():
            self.row[index] = self._replacement_row(index, seed)

    def digest_lines(self, indices: Sequence[int]) -> list[str]:
        """Key, task, alternative and epoch of some candidates, a line each; the step's digest hashes them."""
        lines = [""] * len(indices)
        chosen = np.asarray(indices, dtype=np.int64)
        for number, (epoch, costs) in enumerate(self.windows):
            in_window = np.flatnonzero(self.window_index[chosen] == number)
            rows = self.row[chosen[in_window]]
            keys = costs.keys.take(pa.array(rows)).to_pylist()
            alternatives = costs.alternative[rows].tolist()
            for line, key, alternative in zip(in_window.tolist(), keys, alternatives, strict=True):
                lines[line] = f"{key} {self.task} {alternative} {epoch}"
        return lines

    def sample_ref(self, index: int) -> SampleRef:
        """One candidate as the loader needs it."""
        epoch, costs = self.windows[self.window_index[index]]
        return make_sample_ref(
            costs, int(self.row[index]), self.task, self.phase, epoch, self._locate(int(self.positions[index]))
        )

    def queue(self) -> Queue:
        """Sizes and costs of all candidates, for packing."""
        return Queue([0, len(self.row)], self._column("sizes").tolist(), self._column("cost").tolist())

    def _column(self, name: str) -> np.ndarray:
        """A field of SampleCosts for all candidates: [N], or [caps, N] for sizes."""
        columns = [getattr(costs, name) for _, costs in self.windows]
        out = np.empty((*columns[0].shape[:-1], len(self.row)), dtype=columns[0].dtype)
        for number, column in enumerate(columns):
            in_window = self.window_index == number
            out[..., in_window] = column[..., self.row[in_window]]
        return out

    def _replacement_row(self, index: int, seed: int) -> int:
        """A usable row of the candidate's window. Raises UserError if there is none."""
        epoch, costs = self.windows[self.window_index[index]]
        fitting = np.flatnonzero(costs.usable)
        if not len(fitting):
            url, _ = costs.shards[costs.shard[self.row[index]]]
            raise UserError(
                f"{display_url(url)}: no {self.task} sample near it fits a pack; raise data.pack_tokens (or its other "
                "caps), or lower the size of images, or min_side"
            )
        key = costs.keys[int(self.row[index])].as_py()
        return int(fitting[seed_of(seed, epoch, key, f"{self.task} stand-in") % len(fitting)])


def make_sample_ref(
    costs: SampleCosts, row: int, task: str, phase: int, epoch: int, position: tuple[int, int]
) -> SampleRef:
    """The reference to one row of `costs`; `position` is the index of its pool and the position in that."""
    url, sha256 = costs.shards[costs.shard[row]]
    return SampleRef(
        key=costs.keys[row].as_py(),
        task=task,
        url=url,
        shard=sha256,
        offset=int(costs.offset[row]),
        size=int(costs.size[row]),
        crc32=int(costs.crc32[row]),
        epoch=epoch,
        alternative=int(costs.alternative[row]),
        num_tokens=int(costs.num_tokens[row]),
        num_visual=int(costs.num_visual[row]),
        max_tokens=int(costs.max_tokens[row]),
        phase=phase,
        pool=position[0],
        position=position[1],
        stem=int(costs.stem[row]),
        caption=None if costs.captions is None else costs.captions[row].as_py(),
        folder=costs.folders[costs.shard[row]] if costs.folders else "",
    )
