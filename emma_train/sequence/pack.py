"""The packed batch: several samples as one sequence of tokens, in branch order.

The residual stream of a pack is  [ text | understanding images | reference images | target images ],  so that the Und
and the Gen branch each have one slice, and the embedding of a pack is one concatenation. Tables, not the order in
memory, say what a token may see:  token q sees token k  iff  sample[q] == sample[k] and position[k] <= limit[q].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from emma_train.sequence.image_rules import EMMA_RULES, ImageRules
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.spans import Spans, spans
from emma_train.sequence.tasks import TASKS

IGNORE_STEM = -1


@dataclass
class ImageTokens:
    """An image of a sample as visual tokens."""

    grid: tuple[int, int]
    """Rows and columns of visual tokens."""
    patches: np.ndarray | None = None
    """uint8 [rows*columns*shuffle², patch*patch*3] in block order; None where only the latent is needed and cached."""
    latent: np.ndarray | None = None
    """float32 [rows*columns, channels], unscaled DC-AE output in raster order; None means encode online."""
    stem: int = IGNORE_STEM
    """1 for STEM, 0 for general, -1 for unknown (understanding images)."""


@dataclass
class Sample:
    """One sample, ready to be packed."""

    key: str
    task: str
    segments: list[Segment]
    images: dict[str, ImageTokens]
    noise_seed: int = 0
    """Seed of the target's noise."""
    time_seed: int = 0
    """Seed of the target's flow time."""
    source: str = ""
    """Name of its source in metrics; empty where its task has only one."""
    rules: ImageRules = EMMA_RULES
    """How its images stand in the sequence."""

    @property
    def num_tokens(self) -> int:
        return sum(self.segment_tokens(segment) for segment in self.segments)

    def segment_tokens(self, segment: Segment) -> int:
        """Tokens of one of its segments."""
        if isinstance(segment, TextSegment):
            return len(segment.ids)
        rows, columns = self.images[segment.name].grid
        return rows * columns * (1 if segment.role is ImageRole.TARGET else self.rules.tokens_per_cell)

    @property
    def num_positions(self) -> int:
        """Rotary positions that its tokens have."""
        if not self.rules.one_position:
            return self.num_tokens
        return sum(len(s.ids) if isinstance(s, TextSegment) else 1 for s in self.segments)


@dataclass
class PackedBatch:
    """A pack. T tokens, P visible patches, C latent channels."""

    keys: list[str]
    """Sample keys, in pack order."""
    tasks: list[str]
    """Their tasks."""
    counts: tuple[int, int, int, int]
    """Tokens of the stream's four groups: text, understanding, reference, target. Where images have tokens of both
    kinds, the semantic ones of all images of a role come before their latent ones."""
    max_length: int
    """Tokens of the longest sample."""
    grids: dict[ImageRole, list[tuple[int, int]]]
    """(rows, columns) of the images of each role, in stream order."""
    text_ids: torch.Tensor
    """int64 [counts[0]]."""
    sample: torch.Tensor
    """int64 [T]: index of the sample in the pack."""
    position: torch.Tensor
    """int64 [T]: position in the sample, for the mask and, without `rotary_position`, for RoPE."""
    limit: torch.Tensor
    """int64 [T]: last position that the token sees."""
    spans: Spans
    """The same rule for kernels of variable-length attention; not of packs that continue others."""
    predictors: torch.Tensor
    """int64 [L]: stream index of the token before each supervised one (always in the Und slice)."""
    labels: torch.Tensor
    """int64 [L]: the supervised ids."""
    patches: torch.Tensor
    """uint8 [P, patch*patch*3]: understanding and reference images, then, where latents are not cached, targets."""
    latents: torch.Tensor | None
    """float32 [cells of all images, C] unscaled, in stream order; None where the autoencoder must run."""
    noise_seeds: torch.Tensor
    """int64 [targets]."""
    time_seeds: torch.Tensor
    """int64 [targets]."""
    target_of_token: torch.Tensor
    """int64 [counts[3]]: index of the target image of each target token."""
    target_tasks: list[str]
    """Task of each target."""
    task_index: torch.Tensor
    """int64 [samples]: index of each sample's task in TASKS."""
    target_task_index: torch.Tensor
    """int64 [targets]: the same of each target."""
    stem: torch.Tensor
    """int64 [understanding images]: 1 STEM, 0 general, -1 unknown."""
    semantic_only: torch.Tensor | None = None
    """bool [understanding tokens]: whether the model must not see the token's latent; None if it may see all."""
    rotary_position: torch.Tensor | None = None
    """int64 [T]: position for RoPE where all tokens of an image have one; None where it is `position`."""
    stem_labels: list[int] = field(default_factory=list)
    """The values of `stem` on the host."""
    num_dropped: int = 0
    """Samples of the plan that could not be read."""
    sources: list[str] = field(default_factory=list)
    """Source of each sample, by its name in metrics."""
    target_sources: list[str] = field(default_factory=list)
    """Source of each target."""

    @property
    def num_und(self) -> int:
        """Tokens of the Und branch."""
        return self.counts[0] + self.counts[1]

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def num_cells(self) -> tuple[int, int, int]:
        """Cells of the grids of all understanding, reference and target images: rows of latents."""
        und, reference, target = (sum(rows * columns for rows, columns in self.grids[role]) for role in ImageRole)
        return und, reference, target

    @property
    def num_supervised(self) -> dict[str, int]:
        """Supervised text tokens by task; of a batch on the host."""
        numbers: dict[str, int] = {}
        owners = torch.bincount(self.sample[self.predictors], minlength=len(self.tasks)).tolist()
        for task, number in zip(self.tasks, owners, strict=True):
            numbers[task] = numbers.get(task, 0) + number
        return numbers

    @property
    def num_target_tokens(self) -> dict[str, int]:
        """Flow-matching tokens by task."""
        sizes: dict[str, int] = {}
        for task, (rows, columns) in zip(self.target_tasks, self.grids[ImageRole.TARGET], strict=True):
            sizes[task] = sizes.get(task, 0) + rows * columns
        return sizes

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device; host-side tables stay on the host."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor | Spans)
        }
        return replace(self, **moved)


GROUP_OF_RUN = (0, 1, 1, 2, 2, 3)
"""Group of the stream of each kind of run: text; semantic and latent tokens of understanding images, and of references;
targets. Tokens that are both count as semantic ones."""


class _StreamTables:
    """Tables of the tokens of some samples, collected segment by segment for each kind of run."""

    def __init__(self) -> None:
        self.columns: dict[str, list[list[np.ndarray]]] = {
            name: [[] for _ in range(len(GROUP_OF_RUN))] for name in ("sample", "position", "limit", "rotary_position")
        }
        self.text_ids: list[int] = []
        self.supervised: list[tuple[int, int, int]] = []
        """(sample, position, id) of every supervised token."""
        self.images: dict[ImageRole, list[ImageTokens]] = {role: [] for role in ImageRole}
        self.semantic_only: list[torch.Tensor] = []
        self.target_samples: list[Sample] = []
        """The sample of each target."""

    def add(self, index: int, sample: Sample) -> None:
        """Add a sample as number `index` of the pack."""
        position = rotary_position = 0
        for segment in sample.segments:
            length = sample.segment_tokens(segment)
            if isinstance(segment, TextSegment):
                runs, causal, num_positions = [0], True, length
                self.text_ids += segment.ids
                if segment.supervised:
                    self.supervised += [(index, position + i, token) for i, token in enumerate(segment.ids)]
            else:
                image = sample.images[segment.name]
                num_runs = length // (image.grid[0] * image.grid[1])
                first = GROUP_OF_RUN.index(segment.role)
                runs = list(range(first, first + num_runs))
                causal = segment.role is ImageRole.UND and not sample.rules.full_und
                num_positions = 1 if sample.rules.one_position else length
                self.images[segment.role].append(image)
                if segment.role is ImageRole.UND:
                    self.semantic_only.append(torch.full((length,), segment.semantic_only))
                if segment.role is ImageRole.TARGET:
                    self.target_samples.append(sample)
            positions = np.arange(position, position + length)
            self._append("sample", runs, np.full(length, index))
            self._append("position", runs, positions)
            self._append("limit", runs, positions if causal else np.full(length, position + length - 1))
            rotary = rotary_position + np.minimum(np.arange(length), num_positions - 1)
            self._append("rotary_position", runs, rotary)
            position, rotary_position = position + length, rotary_position + num_positions

    def _append(self, name: str, runs: Sequence[int], values: np.ndarray) -> None:
        """Divide the values of a segment evenly among its runs."""
        for run, part in zip(runs, np.split(values, len(runs)), strict=True):
            self.columns[name][run].append(part)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Tokens of the four groups."""
        counts = [0, 0, 0, 0]
        for group, parts in zip(GROUP_OF_RUN, self.columns["position"], strict=True):
            counts[group] += sum(map(len, parts))
        text, und, reference, target = counts
        return text, und, reference, target

    def column(self, name: str) -> np.ndarray:
        """A table in stream order: int64 [T]."""
        parts = [part for group in self.columns[name] for part in group]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def pack(samples: Sequence[Sample], num_dropped: int = 0) -> PackedBatch:
    """Join samples to one pack. Order within each group of the stream follows `samples`.

    Raises ValueError if an image that the model or the autoencoder must see has no patches.
    """
    tables = _StreamTables()
    for index, sample in enumerate(samples):
        tables.add(index, sample)
    owner, position, limit = (tables.column(name) for name in ("sample", "position", "limit"))
    counts, images, targets = tables.counts, tables.images, tables.target_samples
    order = [*images[ImageRole.UND], *images[ImageRole.REFERENCE], *images[ImageRole.TARGET]]
    cached = all(image.latent is not None for image in order)
    seen = order if not cached else order[: len(order) - len(images[ImageRole.TARGET])]
    patches = [image.patches for image in seen if image.patches is not None]
    if len(patches) != len(seen):
        raise ValueError("an image without patches is only allowed as a target whose pack has all latents")
    num_und = counts[0] + counts[1]
    stream_index = {
        pair: i for i, pair in enumerate(zip(owner[:num_und].tolist(), position[:num_und].tolist(), strict=True))
    }
    target_sizes = [rows * columns for rows, columns in (image.grid for image in images[ImageRole.TARGET])]
    return PackedBatch(
        keys=[s.key for s in samples],
        tasks=[s.task for s in samples],
        counts=counts,
        max_length=max(sample.num_tokens for sample in samples),
        grids={role: [p.grid for p in images[role]] for role in ImageRole},
        text_ids=torch.tensor(tables.text_ids, dtype=torch.int64),
        sample=torch.from_numpy(owner),
        position=torch.from_numpy(position),
        limit=torch.from_numpy(limit),
        spans=spans(owner, position, limit),
        predictors=torch.tensor([stream_index[s, p - 1] for s, p, _ in tables.supervised], dtype=torch.int64),
        labels=torch.tensor([token for _, _, token in tables.supervised], dtype=torch.int64),
        patches=torch.from_numpy(np.concatenate(patches)) if patches else torch.zeros(0, 0, dtype=torch.uint8),
        latents=torch.from_numpy(np.concatenate([p.latent for p in order])) if cached and order else None,
        noise_seeds=torch.tensor([s.noise_seed for s in targets], dtype=torch.int64),
        time_seeds=torch.tensor([s.time_seed for s in targets], dtype=torch.int64),
        target_of_token=torch.repeat_interleave(
            torch.arange(len(targets)), torch.tensor(target_sizes, dtype=torch.int64)
        ),
        target_tasks=[s.task for s in targets],
        task_index=_task_index(samples),
        target_task_index=_task_index(targets),
        stem=torch.tensor([image.stem for image in images[ImageRole.UND]], dtype=torch.int64),
        stem_labels=[image.stem for image in images[ImageRole.UND]],
        semantic_only=torch.cat(tables.semantic_only) if any(map(torch.any, tables.semantic_only)) else None,
        rotary_position=_rotary_position(samples, tables),
        num_dropped=num_dropped,
        sources=[s.source for s in samples],
        target_sources=[s.source for s in targets],
    )


def _task_index(samples: Sequence[Sample]) -> torch.Tensor:
    order = list(TASKS)
    return torch.tensor([order.index(sample.task) for sample in samples], dtype=torch.int64)


def _rotary_position(samples: Sequence[Sample], tables: _StreamTables) -> torch.Tensor | None:
    differs = any(sample.rules.one_position for sample in samples)
    return torch.from_numpy(tables.column("rotary_position")) if differs else None


def continued(batch: PackedBatch, before: Sequence[Sample]) -> PackedBatch:
    """The pack as a continuation of what its samples have already, `before` (model/cache.py)."""

    def start(numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=batch.sample.device)[batch.sample]

    tokens, rotary = start([sample.num_tokens for sample in before]), batch.rotary_position
    if rotary is not None:
        rotary = rotary + start([sample.num_positions for sample in before])
    return replace(batch, position=batch.position + tokens, limit=batch.limit + tokens, rotary_position=rotary)


def image_segments(segments: Sequence[Segment]) -> list[ImageSegment]:
    """The images of a layout, in order."""
    return [s for s in segments if isinstance(s, ImageSegment)]
