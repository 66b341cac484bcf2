"""Which samples make optimizer step k (contract 2): a pure function of (seed, k, manifests), the same on every rank.

A step takes the tasks in their exact ratio: either a fixed number of samples, or as many as its slots hold. World size
never enters: ranks only decide who computes which slot. What a task has taken is one number, and a few positions that
were left behind; that is all that a resume needs, however far the run is.
"""

import hashlib
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.planner.candidates import Candidates, SampleRef, planned_row
from data_pipelines.planner.costs import CostModel
from data_pipelines.planner.packing import EVEN, Queue, Slots, deal, evenness, fill, look_ahead, spread, sums
from data_pipelines.planner.shuffle import WeightedInterleave
from data_pipelines.planner.sources import Sources
from emma_train.config.mix import TASK_NAMES, phases, samples_per_task
from emma_train.config.schema import MixConfig, Recipe
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.tokens import TextTokenizer

GRAINS = 400
"""Units of a step where the ratio is by tokens."""


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step computes."""

    step: int
    digest: str
    """Hash of the keys, choices and places of all samples of the step."""
    straggler: float
    """Cost of the heaviest slot over the mean."""
    filled: float
    """LLM tokens over the room for them."""
    too_long: int
    """Samples that were too long for any pack; others stand in for them."""
    epoch: float
    """Epochs that the run has read of its most read pool of samples; in a phase's own sources."""
    offers: list["Candidates"] = field(compare=False, repr=False)
    places: Slots = field(compare=False, repr=False)
    """(offers, place among them) of the samples of each slot."""

    def slot(self, number: int) -> tuple[SampleRef, ...]:
        """The samples of one slot."""
        return tuple(self.offers[task].planned(place) for task, place in self.places[number])

    @property
    def slots(self) -> tuple[tuple[SampleRef, ...], ...]:
        """The samples of every slot."""
        return tuple(self.slot(number) for number in range(len(self.places)))


@dataclass(slots=True)
class TaskCursor:
    """How far a task is."""

    next: int = 0
    """First position that was never looked at."""
    left: tuple[int, ...] = ()
    """Positions before it that are still to come, in order."""
    tokens: int = 0
    """LLM tokens of all samples so far, where the ratio is by tokens."""


@dataclass(frozen=True)
class _Phase:
    number: int
    start: int
    """Steps before it."""
    shares: dict[str, int]
    """The task ratio."""
    counts: dict[str, int]
    """Samples per step, by task; empty where a step takes as many as fit."""
    blends: dict[str, WeightedInterleave]
    taken: dict[str, int]
    """Samples that earlier phases took at a fixed number a step: a phase goes on where they stopped, so that a source
    that two phases share does not start again with the same samples, choices and noise."""


class Planner:
    """The plan of any step; of packs that are filled, of those after a known state. Holds the index's nearest rows."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        """Reads manifests. Raises UserError where one is missing, of another tokenizer or without samples."""
        self.data, self.model = recipe.data, recipe.model
        caps = {name: getattr(self.data, f"pack_{name}") for name in ("tokens", "pairs", "patches", "pixels")}
        self.caps = {name: cap for name, cap in caps.items() if cap}
        self._lock, sources = threading.Lock(), Sources(self.data, tokenizer)
        self._phases: list[_Phase] = []
        start, taken = 0, dict.fromkeys(TASK_NAMES, 0)
        for number, phase in enumerate(phases(recipe)):
            counts = samples_per_task(phase.mix, self.data.samples_per_step) if self.data.samples_per_step else {}
            shares = _shares(phase.mix)
            blends = {}
            for task in shares:
                image_config = self.data.und if task == "i2t" else self.data.gen
                how = CostModel(task, image_config, self.model, self.caps, self.data.seed)
                blends[task] = sources.blend(phase, how)
            self._phases.append(_Phase(number, start, shares, counts, blends, dict(taken)))
            start += phase.steps
            for task, count in counts.items():
                taken[task] += phase.steps * count
        self.fingerprint = sources.fingerprint
        self._states: dict[int, dict[str, TaskCursor]] = {0: {task: TaskCursor() for task in TASK_NAMES}}
        self._last: StepPlan | None = None
        self._depth: dict[int, int] = {}
        """Units that a step of each phase looks at."""

    def check(self) -> None:
        """Raise UserError where the first step of a phase cannot be packed: arithmetic that cannot work should be told
        before a model is built."""
        for phase in self._phases:
            step = phase.start + 1
            self._compute(step, self._before(step) if phase.counts else self._states[0])

    def plan(self, step: int) -> StepPlan:
        """The slots of optimizer step `step`, from 1. Raises UserError where they cannot hold what they must."""
        with self._lock:
            if self._last is None or self._last.step != step:
                self._last, self._states[step] = self._compute(step, self._before(step))
            return self._last

    def state(self, step: int) -> dict[str, dict[str, Any]]:
        """What the tasks have taken after `step` steps, as plain values."""
        with self._lock:
            taken = self._before(step + 1)
        return {task: {"next": t.next, "left": list(t.left), "tokens": t.tokens} for task, t in taken.items()}

    def load(self, step: int, state: dict[str, dict[str, Any]]) -> None:
        """Go on from `state` after `step` steps."""
        tasks = {
            task: TaskCursor(values["next"], tuple(values["left"]), values["tokens"]) for task, values in state.items()
        }
        self._states, self._last = {step: {**{task: TaskCursor() for task in TASK_NAMES}, **tasks}}, None

    def forget(self, step: int) -> None:
        """States before that of `step` will not be asked for again."""
        with self._lock:
            for old in [s for s in self._states if s < step]:
                del self._states[old]

    def spare(self, planned: SampleRef, attempt: int) -> SampleRef | None:
        """Another sample of the same task that is no longer, to stand in for one that cannot be read: a pure function
        of its arguments. None where there is none."""
        pool, position = self._phases[planned.phase].blends[planned.task].at(planned.position)
        columns = pool.window_of(position)
        fits = (columns.tokens <= planned.num_tokens) & (columns.seen <= planned.num_visual) & ~columns.refused
        itself = (columns.offset == planned.offset) & (
            columns.shard == columns.shards.index((planned.url, planned.shard))
        )
        choices = np.flatnonzero(fits & ~itself)
        if not len(choices):
            return None
        draw = seed_of(self.data.seed, planned.epoch, planned.key, f"{planned.task} spare {attempt}")
        row = int(choices[draw % len(choices)])
        return planned_row(columns, row, planned.task, planned.phase, planned.epoch, planned.position)

    def _before(self, step: int) -> dict[str, TaskCursor]:
        """What the tasks have taken before a step."""
        if self.data.samples_per_step:
            phase = self._phase(step)
            counts, steps = phase.counts, step - 1 - phase.start
            return {task: TaskCursor(taken + steps * counts.get(task, 0)) for task, taken in phase.taken.items()}
        known = max((s for s in self._states if s < step), default=None)
        if known is None:
            raise UserError(f"step {step} was asked for, but the stream goes on after step {min(self._states)}")
        for number in range(known + 1, step):
            self._states[number] = self._compute(number, self._states[number - 1])[1]
        return self._states[step - 1]

    def _phase(self, step: int) -> _Phase:
        return next(phase for phase in reversed(self._phases) if step > phase.start)

    def _compute(self, step: int, before: dict[str, TaskCursor]) -> tuple[StepPlan, dict[str, TaskCursor]]:
        phase = self._phase(step)
        make = self._fixed_count if phase.counts else self._fill_packs
        offers, queues, slots = make(step, phase, before)
        taken: list[list[int]] = [[] for _ in offers]
        for slot in slots:
            for number, place in slot:
                taken[number].append(place)
        # Lines go by slot, so that the digest tells where each sample went.
        lines = [iter(own.lines(places)) for own, places in zip(offers, taken, strict=True)]
        text = "\n".join(next(lines[number]) for slot in slots for number, _ in slot)
        costs, sizes = sums(queues, slots)
        after = dict(before)
        for own, queue, places in zip(offers, queues, taken, strict=True):
            tokens = before[own.task].tokens + sum(queue.sizes[0][place] for place in places)
            after[own.task] = _advanced(before[own.task], own.positions, places, tokens)
        plan = StepPlan(
            step=step,
            digest=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
            straggler=max(costs) * len(costs) / sum(costs),
            filled=sum(size[0] for size in sizes) / (self.data.slots * self.data.pack_tokens),
            too_long=sum(int(own.refused[places].sum()) for own, places in zip(offers, taken, strict=True)),
            epoch=max(phase.blends[task].epochs(after[task].next - len(after[task].left)) for task in phase.shares),
            offers=offers,
            places=slots,
        )
        return plan, after

    def _fixed_count(
        self, step: int, phase: _Phase, before: dict[str, TaskCursor]
    ) -> tuple[list[Candidates], list[Queue], Slots]:
        """A fixed number of samples."""
        offers = [self._offers(phase, task, before[task], count) for task, count in phase.counts.items()]
        queues = [own.queue() for own in offers]
        caps, slots = list(self.caps.values()), deal(queues, self.data.slots)
        most = np.max(sums(queues, slots)[1], axis=0)
        fits = not (most > caps).any()
        if not fits or evenness(queues, slots) > EVEN:
            # Packs that fit and cost the same matter more than packs that hold as many of each task.
            spread_out = spread(queues, self.data.slots, caps)
            if spread_out is None and not fits:
                name, value = next((n, v) for n, v in zip(self.caps, most.tolist(), strict=True) if v > self.caps[n])
                raise UserError(
                    f"step {step} packs {value} {name} into one slot, more than data.pack_{name}={self.caps[name]}; "
                    f"raise it, or data.slots, or lower data.samples_per_step={self.data.samples_per_step} "
                    "(0 takes what fits)"
                )
            if spread_out and (not fits or evenness(queues, spread_out) < evenness(queues, slots)):
                slots = spread_out
        return offers, queues, slots

    def _fill_packs(
        self, step: int, phase: _Phase, before: dict[str, TaskCursor]
    ) -> tuple[list[Candidates], list[Queue], Slots]:
        """As many samples as the slots hold."""
        ahead, caps = look_ahead(self.data.slots), list(self.caps.values())
        depth = self._depth.get(phase.number, self.data.slots)
        while True:
            offers = [self._offers(phase, t, before[t], share * depth + ahead) for t, share in phase.shares.items()]
            queues = [own.queue() for own in offers]
            for queue, counts in zip(queues, self._counts(phase, before, queues), strict=True):
                queue.counts = [count for count in counts if count <= len(queue.costs) - ahead]
            units = min(len(queue.counts) for queue in queues) - 1
            heads = [[sum(of[: q.counts[units]]) for of in q.sizes] for q in queues]
            if any(sum(head[d] for head in heads) >= self.data.slots * cap for d, cap in enumerate(caps)):
                break
            depth *= 2
        self._depth[phase.number] = depth
        if (slots := fill(queues, self.data.slots, caps)) is None:
            raise UserError(
                f"step {step}: not one sample of each task of the mix {':'.join(map(str, phase.shares.values()))} fits "
                f"data.slots={self.data.slots} packs of data.pack_tokens={self.data.pack_tokens}; raise one of them"
            )
        return offers, queues, slots

    def _counts(self, phase: _Phase, before: dict[str, TaskCursor], queues: list[Queue]) -> list[list[int]]:
        """Samples of each task that so many units take, by the ratio of samples or of tokens."""
        shares = list(phase.shares.values())
        if self.data.mix_by == "samples":
            return [list(range(0, len(queue.costs) + 1, share)) for queue, share in zip(queues, shares, strict=True)]
        so_far, counts = sum(before[task].tokens for task in phase.shares), []
        grain = self.data.slots * self.data.pack_tokens / GRAINS
        for (task, share), queue in zip(phase.shares.items(), queues, strict=True):
            due = share / sum(shares) * (so_far + grain * np.arange(2 * GRAINS)) - before[task].tokens
            ends = np.searchsorted(np.cumsum(queue.sizes[0]), due, side="right")
            counts.append(np.where(due > 0, ends, 0).tolist())
        return counts

    def _offers(self, phase: _Phase, task: str, taken: TaskCursor, num: int) -> Candidates:
        left = np.asarray(taken.left[:num], dtype=np.int64)
        fresh = np.arange(taken.next, taken.next + num - len(left), dtype=np.int64)
        return Candidates(task, phase.number, np.concatenate([left, fresh]), phase.blends[task], self.data.seed)


def _shares(mix: MixConfig) -> dict[str, int]:
    """The task ratio in its lowest terms."""
    shares = {task: getattr(mix, task) for task in TASK_NAMES if getattr(mix, task)}
    divisor = math.gcd(*shares.values())
    return {task: share // divisor for task, share in shares.items()}


def _advanced(before: TaskCursor, positions: np.ndarray, places: list[int], tokens: int) -> TaskCursor:
    """What a task has taken after a step that took some places of what it offered."""
    last = max(places, default=-1)
    gone = set(places)
    passed_over = [place for place in range(last + 1) if place not in gone]
    left = [*positions[passed_over].tolist(), *(p for p in before.left if p > (positions[last] if last >= 0 else -1))]
    return TaskCursor(max(before.next, int(positions[last]) + 1 if last >= 0 else 0), tuple(left), tokens)
