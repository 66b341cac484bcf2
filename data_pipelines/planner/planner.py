"""Decides which samples make optimizer step k: a function of (seed, k, manifests) alone, the same on every rank.

A step takes the tasks in their exact ratio: either a fixed number of samples, or as many as its slots hold. World size
has no influence: it only decides which rank computes which slot. The state to resume from is one TaskCursor per task,
which stays small however far the run is.
"""

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.planner.candidates import Candidates, SampleRef, make_sample_ref
from data_pipelines.planner.costs import CostModel
from data_pipelines.planner.packing import EVEN, Queue, Slots, deal, evenness, fill, look_ahead, spread, sums
from data_pipelines.planner.shuffle import WeightedInterleave
from data_pipelines.planner.sources import Sources
from data_pipelines.shards.record import added_text_tokens
from emma_train.config.mix import TASK_NAMES, phases, samples_per_task, task_shares
from emma_train.config.schema import MixConfig, Recipe
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.tasks import TASKS, fixed_text_tokens
from emma_train.sequence.tokens import TextTokenizer

TOKEN_UNITS = 400
"""If the mix is by tokens: units into which the token capacity of a step is divided."""


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step computes."""

    step: int
    digest: str
    """Hash of key, task, alternative and epoch of all samples, slot after slot."""
    straggler: float
    """Cost of the costliest slot divided by the mean."""
    filled: float
    """LLM tokens of all slots divided by their capacity."""
    too_long: int
    """Samples that were too long for any pack; each was replaced by another of its window."""
    epoch: float
    """Epochs that the run has read of its most read pool of samples; in a phase's own sources."""
    candidates: list[Candidates] = field(compare=False, repr=False)
    """One per task of the mix."""
    slot_items: Slots = field(compare=False, repr=False)
    """(index into `candidates`, index of a candidate) of the samples of each slot."""

    def slot(self, number: int) -> tuple[SampleRef, ...]:
        """The samples of one slot."""
        return tuple(self.candidates[task].sample_ref(index) for task, index in self.slot_items[number])

    @property
    def slots(self) -> tuple[tuple[SampleRef, ...], ...]:
        """The samples of every slot."""
        return tuple(self.slot(number) for number in range(len(self.slot_items)))


@dataclass(slots=True)
class TaskCursor:
    """Cursor of one task's stream: the next unread position, and earlier positions that were skipped and come first."""

    next: int = 0
    """First position after all taken ones."""
    skipped: tuple[int, ...] = ()
    """Positions below `next` that are not taken yet, in order."""
    tokens: int = 0
    """LLM tokens of all samples taken so far; used if the mix is by tokens."""

    def state(self) -> dict[str, Any]:
        """As a checkpoint stores it."""
        return {"next": self.next, "left": list(self.skipped), "tokens": self.tokens}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TaskCursor":
        """The inverse of `state`."""
        return cls(state["next"], tuple(state["left"]), state["tokens"])

    def positions(self, num: int) -> np.ndarray:
        """The next `num` positions: skipped ones first. int64 [num]."""
        skipped = np.asarray(self.skipped[:num], dtype=np.int64)
        fresh = np.arange(self.next, self.next + num - len(skipped), dtype=np.int64)
        return np.concatenate([skipped, fresh])

    def after(self, positions: np.ndarray, taken: Sequence[int], tokens: int) -> "TaskCursor":
        """The cursor after a step whose candidates were at `positions` and that took those with indices `taken`.

        `tokens` is the new total.
        """
        last = max(taken, default=-1)
        last_position = int(positions[last]) if last >= 0 else -1
        indices = set(taken)
        skipped = [index for index in range(last + 1) if index not in indices]
        still_skipped = [position for position in self.skipped if position > last_position]
        return TaskCursor(max(self.next, last_position + 1), (*positions[skipped].tolist(), *still_skipped), tokens)


@dataclass(frozen=True)
class _Phase:
    number: int
    start: int
    """Number of steps before the phase."""
    shares: dict[str, int]
    """The task ratio in its lowest terms."""
    counts: dict[str, int]
    """Samples per step by task; empty if a step takes as many as fit."""
    streams: dict[str, WeightedInterleave]
    """The stream of samples of each task."""
    taken: dict[str, int]
    """Samples by task that earlier phases took, if the number per step is fixed. The phase continues at these
    positions, so that a source of two phases does not repeat the same samples, alternatives and noise."""


class Planner:
    """Makes the plan of any step. If packs are filled, of any step after a known state."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        """Reads the manifests. Raises UserError if one is missing, is of another tokenizer or has no samples."""
        self.data = recipe.data
        self.model = recipe.model
        caps = {name: getattr(self.data, f"pack_{name}") for name in ("tokens", "pairs", "patches", "pixels")}
        self.caps = {name: cap for name, cap in caps.items() if cap}
        sources = Sources(self.data, tokenizer)
        self._phases = self._make_phases(recipe, sources, tokenizer)
        self.fingerprint = sources.fingerprint
        """Hash of the shards and rows that the plan can use."""
        self._lock = threading.Lock()
        self._cursors: dict[int, dict[str, TaskCursor]] = {0: {task: TaskCursor() for task in TASK_NAMES}}
        """Cursors by task after a step, for the steps that are needed."""
        self._last: StepPlan | None = None
        self._depth: dict[int, int] = {}
        """By phase: the number of units that `_fill_packs` makes candidates for."""

    def _make_phases(self, recipe: Recipe, sources: Sources, tokenizer: TextTokenizer) -> list[_Phase]:
        result: list[_Phase] = []
        start, taken = 0, dict.fromkeys(TASK_NAMES, 0)
        for number, phase in enumerate(phases(recipe)):
            counts = samples_per_task(phase.mix, self.data.samples_per_step) if self.data.samples_per_step else {}
            shares = _shares(phase.mix)
            streams = {}
            for task in shares:
                image_config = TASKS[task].image_config(self.data)
                fixed = fixed_text_tokens(TASKS[task], tokenizer)
                added = added_text_tokens(TASKS[task], tokenizer, self.data.caption_questions)
                cost_model = CostModel(task, image_config, self.model, self.caps, self.data.seed, fixed, added)
                streams[task] = sources.stream(phase, cost_model)
            result.append(_Phase(number, start, shares, counts, streams, dict(taken)))
            start += phase.steps
            for task, count in counts.items():
                taken[task] += phase.steps * count
        return result

    def check(self) -> None:
        """Raise UserError if the first step of a phase cannot be packed. Called before the model is built, so that
        such a recipe fails early."""
        for phase in self._phases:
            step = phase.start + 1
            self._compute(step, self._cursors_before(step) if phase.counts else self._cursors[0])

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, counted from 1. Raises UserError if its samples do not fit its slots."""
        with self._lock:
            if self._last is None or self._last.step != step:
                self._last, self._cursors[step] = self._compute(step, self._cursors_before(step))
            return self._last

    def state(self, step: int) -> dict[str, dict[str, Any]]:
        """The cursors after `step` steps, as plain values."""
        with self._lock:
            cursors = self._cursors_before(step + 1)
        return {task: cursor.state() for task, cursor in cursors.items()}

    def load(self, step: int, state: dict[str, dict[str, Any]]) -> None:
        """Continue from `state` after `step` steps. A task that the state lacks starts at its first sample."""
        cursors = {task: TaskCursor() for task in TASK_NAMES}
        cursors |= {task: TaskCursor.from_state(values) for task, values in state.items()}
        self._cursors, self._last = {step: cursors}, None

    def forget(self, step: int) -> None:
        """Free the cursors of steps before `step`; these steps cannot be planned again."""
        with self._lock:
            for old in [s for s in self._cursors if s < step]:
                del self._cursors[old]

    def substitute(self, sample: SampleRef, attempt: int) -> SampleRef | None:
        """Another sample of the same task and window, to use if `sample` cannot be read. It is no longer than that.

        A function of its arguments alone; `attempt` numbers the substitutes, from 0. Returns None if there is none.
        """
        pool, position = self._phases[sample.phase].streams[sample.task].locate(sample.position)
        costs = pool.window_costs(position)
        fits = (costs.num_tokens <= sample.num_tokens) & (costs.num_visual <= sample.num_visual) & ~costs.too_long
        shard = costs.shards.index((sample.url, sample.shard))
        is_sample = (costs.offset == sample.offset) & (costs.shard == shard)
        rows = np.flatnonzero(fits & ~is_sample)
        if not len(rows):
            return None
        seed = seed_of(self.data.seed, sample.epoch, sample.key, f"{sample.task} spare {attempt}")
        row = int(rows[seed % len(rows)])
        return make_sample_ref(costs, row, sample.task, sample.phase, sample.epoch, sample.position)

    def _cursors_before(self, step: int) -> dict[str, TaskCursor]:
        if self.data.samples_per_step:
            phase = self._phase(step)
            counts, steps = phase.counts, step - 1 - phase.start
            return {task: TaskCursor(taken + steps * counts.get(task, 0)) for task, taken in phase.taken.items()}
        known = max((s for s in self._cursors if s < step), default=None)
        if known is None:
            raise UserError(f"step {step} was asked for, but the stream goes on after step {min(self._cursors)}")
        for number in range(known + 1, step):
            self._cursors[number] = self._compute(number, self._cursors[number - 1])[1]
        return self._cursors[step - 1]

    def _phase(self, step: int) -> _Phase:
        return next(phase for phase in reversed(self._phases) if step > phase.start)

    def _compute(self, step: int, before: dict[str, TaskCursor]) -> tuple[StepPlan, dict[str, TaskCursor]]:
        """The plan of a step, and the cursors after it."""
        phase = self._phase(step)
        choose = self._fixed_count if phase.counts else self._fill_packs
        candidates, queues, slots = choose(step, phase, before)
        taken: list[list[int]] = [[] for _ in candidates]
        for slot in slots:
            for number, index in slot:
                taken[number].append(index)
        after = dict(before)
        for of_task, queue, indices in zip(candidates, queues, taken, strict=True):
            cursor = before[of_task.task]
            tokens = cursor.tokens + sum(queue.sizes[0][index] for index in indices)
            after[of_task.task] = cursor.after(of_task.positions, indices, tokens)
        costs, sizes = sums(queues, slots)
        plan = StepPlan(
            step=step,
            digest=_digest(candidates, slots, taken),
            straggler=max(costs) * len(costs) / sum(costs),
            filled=sum(size[0] for size in sizes) / (self.data.slots * self.data.pack_tokens),
            too_long=sum(int(c.too_long[indices].sum()) for c, indices in zip(candidates, taken, strict=True)),
            epoch=max(s.epochs(after[task].next - len(after[task].skipped)) for task, s in phase.streams.items()),
            candidates=candidates,
            slot_items=slots,
        )
        return plan, after

    def _fixed_count(
        self, step: int, phase: _Phase, before: dict[str, TaskCursor]
    ) -> tuple[list[Candidates], list[Queue], Slots]:
        """Take a fixed number of samples of each task."""
        candidates = [self._candidates(phase, task, before[task], count) for task, count in phase.counts.items()]
        queues = [of_task.queue() for of_task in candidates]
        caps, slots = list(self.caps.values()), deal(queues, self.data.slots)
        largest = np.max(sums(queues, slots)[1], axis=0)
        fits = not (largest > caps).any()
        if not fits or evenness(queues, slots) > EVEN:
            # It is more important that packs fit and cost the same than that each holds as many samples of each task.
            spread_out = spread(queues, self.data.slots, caps)
            if spread_out is None and not fits:
                name, value = next((n, v) for n, v in zip(self.caps, largest.tolist(), strict=True) if v > self.caps[n])
                raise UserError(
                    f"step {step} packs {value} {name} into one slot, more than data.pack_{name}={self.caps[name]}; "
                    f"raise it, or data.slots, or lower data.samples_per_step={self.data.samples_per_step} "
                    "(0 takes what fits)"
                )
            if spread_out and (not fits or evenness(queues, spread_out) < evenness(queues, slots)):
                slots = spread_out
        return candidates, queues, slots

    def _fill_packs(
        self, step: int, phase: _Phase, before: dict[str, TaskCursor]
    ) -> tuple[list[Candidates], list[Queue], Slots]:
        """Take as many samples as the slots hold, in the ratio of the tasks."""
        ahead, caps = look_ahead(self.data.slots), list(self.caps.values())
        depth = self._depth.get(phase.number, self.data.slots)
        while True:  # until the candidates are certain to fill the slots
            candidates = [
                self._candidates(phase, task, before[task], share * depth + ahead)
                for task, share in phase.shares.items()
            ]
            queues = [of_task.queue() for of_task in candidates]
            for queue, counts in zip(queues, self._counts(phase, before, queues), strict=True):
                queue.counts = [count for count in counts if count <= len(queue.costs) - ahead]
            units = min(len(queue.counts) for queue in queues) - 1
            totals = [[sum(sizes[: q.counts[units]]) for sizes in q.sizes] for q in queues]
            if any(sum(total[c] for total in totals) >= self.data.slots * cap for c, cap in enumerate(caps)):
                break
            depth *= 2
        self._depth[phase.number] = depth
        if (slots := fill(queues, self.data.slots, caps)) is None:
            raise UserError(
                f"step {step}: not one sample of each task of the mix {':'.join(map(str, phase.shares.values()))} fits "
                f"data.slots={self.data.slots} packs of data.pack_tokens={self.data.pack_tokens}; raise one of them"
            )
        return candidates, queues, slots

    def _counts(self, phase: _Phase, before: dict[str, TaskCursor], queues: list[Queue]) -> list[list[int]]:
        """For each queue, its number of samples in 0, 1, 2, ... units of the mix, which is by samples or by tokens."""
        shares = list(phase.shares.values())
        if self.data.mix_by == "samples":
            return [list(range(0, len(queue.costs) + 1, share)) for queue, share in zip(queues, shares, strict=True)]
        so_far, counts = sum(before[task].tokens for task in phase.shares), []
        unit = self.data.slots * self.data.pack_tokens / TOKEN_UNITS
        for (task, share), queue in zip(phase.shares.items(), queues, strict=True):
            due = share / sum(shares) * (so_far + unit * np.arange(2 * TOKEN_UNITS)) - before[task].tokens
            ends = np.searchsorted(np.cumsum(queue.sizes[0]), due, side="right")
            counts.append(np.where(due > 0, ends, 0).tolist())
        return counts

    def _candidates(self, phase: _Phase, task: str, cursor: TaskCursor, num: int) -> Candidates:
        return Candidates(task, phase.number, cursor.positions(num), phase.streams[task], self.data.seed)


def _digest(candidates: list[Candidates], slots: Slots, taken: list[list[int]]) -> str:
    """Hash of all samples in the order of the slots, so that it also tells which slot holds which sample."""
    lines = [iter(c.digest_lines(indices)) for c, indices in zip(candidates, taken, strict=True)]
    text = "\n".join(next(lines[number]) for slot in slots for number, _ in slot)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _shares(mix: MixConfig) -> dict[str, int]:
    """The task ratio in its lowest terms."""
    shares = task_shares(mix)
    divisor = math.gcd(*shares.values())
    return {task: share // divisor for task, share in shares.items()}
