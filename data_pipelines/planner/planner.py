"""Decides which samples make optimizer step k: a function of (seed, k, manifests) alone, the same on every rank.

A step takes the tasks in their exact ratio: either a fixed number of samples, or as many as its slots hold. World size
has no influence: it only decides which rank computes which slot. The state to resume from is a position in each pool
(pools.py), which stays small however far the run is.
"""

import hashlib
import logging
import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_pipelines.planner.candidates import Candidates, SampleRef, make_sample_ref
from data_pipelines.planner.costs import CostModel
from data_pipelines.planner.cursor import TaskCursor
from data_pipelines.planner.packing import EVEN, Queue, Slots, deal, evenness, fill, look_ahead, spread, sums
from data_pipelines.planner.pools import Pool, PoolCursor, Positions
from data_pipelines.planner.source_names import source_names
from data_pipelines.planner.sources import Sources, TaskStream
from data_pipelines.shards.record import added_text_tokens
from emma_train.config.mix import TASK_NAMES, phases, samples_per_task, task_shares
from emma_train.config.schema import MixConfig, PhaseConfig, Recipe
from emma_train.errors import UserError
from emma_train.sequence.seeds import seed_of
from emma_train.sequence.tasks import TASKS, fixed_text_tokens
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.urls import display_url

log = logging.getLogger(__name__)
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
    unsuitable: int
    """Samples with an image below min_side or beyond max_aspect; each was replaced likewise."""
    epoch: float
    """Complete epochs of the pool that the run has read most; counts the pools of the current phase only."""
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


@dataclass(frozen=True)
class _Phase:
    number: int
    start: int
    """Number of steps before the phase."""
    end: float
    """Number of steps before the next phase; infinity for the last one."""
    shares: dict[str, int]
    """The task ratio in its lowest terms."""
    counts: dict[str, int]
    """Samples per step by task; empty if a step takes as many as fit."""
    streams: dict[str, TaskStream]
    """The stream of samples of each task."""
    pools: list[Pool]
    """All pools that the run has positions in, of earlier phases too."""
    source_names: dict[str, dict[str, str]]
    """By task and folder, the name of each source of a task that has more than one."""


class Planner:
    """Makes the plan of any step. If packs are filled, of any step after a known state."""

    def __init__(self, recipe: Recipe, tokenizer: TextTokenizer) -> None:
        """Reads the manifests. Raises UserError if one is missing, is of another tokenizer or has no samples."""
        self.data = recipe.data
        self.model = recipe.model
        caps = {name: getattr(self.data, f"pack_{name}") for name in ("tokens", "pairs", "patches", "pixels")}
        self.caps = {name: cap for name, cap in caps.items() if cap}
        self._configs = phases(recipe)
        self._cost_models = {
            task: CostModel(
                task,
                TASKS[task].image_config(self.data),
                self.model,
                self.caps,
                self.data.seed,
                fixed_text_tokens(TASKS[task], tokenizer),
                added_text_tokens(TASKS[task], tokenizer, self.data.caption_questions),
            )
            for task in TASK_NAMES
        }
        log.info("reading the shard indexes")
        self._sources = Sources(self.data, tokenizer)
        self._phases = self._make_phases([], 0)
        self.fingerprint = self._sources.fingerprint([(c, list(task_shares(c.mix))) for c in self._configs])
        """Hash of the shards and rows that the plan can use, as version 0.1.0 stored it."""
        self.folders = self._sources.folders
        """Hash of the shards of each folder that the plan can use."""
        self._lock = threading.Lock()
        self._positions: dict[int, Positions] = {0: Positions()}
        """Positions after a step, for the steps that are needed."""
        self._last: StepPlan | None = None
        self._depth: dict[int, int] = {}
        """By phase: the number of units that `_fill_packs` makes candidates for."""

    def _make_phases(self, known: list[Pool], done: int) -> list[_Phase]:
        """The phases of a run that has read the `known` pools in its first `done` steps."""
        result: list[_Phase] = []
        start = 0
        for number, config in enumerate(self._configs):
            is_last = number == len(self._configs) - 1
            end = math.inf if is_last else start + config.steps
            counts = samples_per_task(config.mix, self.data.samples_per_step) if self.data.samples_per_step else {}
            shares, streams, pools = _shares(config.mix), {}, list(known)
            for task in shares:
                streams[task], pools = self._sources.stream(config, self._cost_models[task], pools)
            names = {task: source_names(stream) for task, stream in streams.items()}
            result.append(_Phase(number, start, end, shares, counts, streams, pools, names))
            start += config.steps
            if end > done:
                known = pools
        return result

    def check(self) -> None:
        """Raise UserError if the first step of a phase cannot be packed. Called before the model is built, so that
        such a recipe fails early."""
        for phase in self._phases:
            step = phase.start + 1
            self._compute(step, self._positions_before(step) if phase.counts else self._positions[0])

    def check_labels(self) -> None:
        """Raise UserError if a phase has no image with a label for router tuning, whose steps would train nothing."""
        if self.data.untagged == "unknown":
            for phase in self._configs:
                self._sources.check_labels(phase, list(task_shares(phase.mix)))

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, counted from 1. Raises UserError if its samples do not fit its slots."""
        with self._lock:
            if self._last is None or self._last.step != step:
                self._last, self._positions[step] = self._compute(step, self._positions_before(step))
            return self._last

    def state(self, step: int) -> dict[str, Any]:
        """The positions after `step` steps, as plain values."""
        with self._lock:
            return self._positions_before(step + 1).state()

    def load(self, step: int, state: dict[str, Any]) -> list[str]:
        """Continue from `state` after `step` steps. Returns a line for each pool that cannot go on where it was.

        Pools that are not in the state start at their first sample.
        """
        positions, lines = self._sources.reopened(Positions.from_state(state), self._configs_from(step))
        self._phases = self._make_phases(list(positions.pools), step)
        self._positions, self._last, self._depth = {step: positions}, None, {}
        return lines

    def load_task_positions(self, step: int, tasks: dict[str, dict[str, Any]]) -> None:
        """Continue from a state of version 0.1.0, which has one position per task and none per pool.

        Each task continues at that position, even in a phase with sources that no earlier phase had.
        """
        pools: dict[Pool, PoolCursor] = {}
        taken = dict.fromkeys(TASK_NAMES, 0)
        current = self._phase(max(step, 1))
        for phase in self._phases[: current.number + 1]:
            for task, stream in phase.streams.items():
                values = tasks.get(task, {"next": 0, "left": []})
                cursor = TaskCursor(values["next"], tuple(values["left"]))
                if phase.counts and phase is not current:
                    taken[task] += int(phase.end - phase.start) * phase.counts[task]
                    cursor = TaskCursor(taken[task])
                pools |= stream.pool_cursors(cursor)
        tokens = {task: values["tokens"] for task, values in tasks.items() if values.get("tokens")}
        self.load(step, Positions(pools, tokens, current.shares).state())

    def position_lines(self, step: int) -> list[str]:
        """For each task of step `step` + 1, a line that says where its pools go on."""
        phase = self._phase(step + 1)
        positions = self._entered(phase, self._positions_before(step + 1))
        lines = []
        for task, stream in phase.streams.items():
            pools = []
            for pool in stream.pools:
                folders = ", ".join(display_url(path) for path in dict.fromkeys(p.source.path for p in pool.kept))
                epoch, sample = divmod(positions.pools[pool].next, pool.num_rows)
                pools.append(f"{folders} at sample {sample} of {pool.num_rows} in epoch {epoch}")
            lines.append(f"{task} goes on in {'; '.join(pools)}")
        return lines

    def forget(self, step: int) -> None:
        """Free the positions of steps before `step`; these steps cannot be planned again."""
        with self._lock:
            for old in [s for s in self._positions if s < step]:
                del self._positions[old]

    def first_packs(self, task: str, num: int) -> list[tuple[SampleRef, ...]]:
        """The first samples of a task that step 1 trains, in their order, at most `num` and each once, as packs within
        the caps."""
        phase = self._phases[0]
        stream = phase.streams[task]
        cursor = stream.cursor(self._entered(phase, Positions()))
        candidates = self._candidates(phase, task, cursor, min(num, sum(pool.num_rows for pool in stream.pools)))
        packs: list[list[SampleRef]] = []
        total = np.array([math.inf])
        for index, sizes in enumerate(zip(*candidates.queue().sizes, strict=True)):
            ref = candidates.sample_ref(index)
            if ref.epoch:  # a pool with a large weight begins again before the others end
                continue
            total = total + sizes
            if (total > list(self.caps.values())).any():
                packs.append([])
                total = np.array(sizes)
            packs[-1].append(ref)
        return [tuple(refs) for refs in packs]

    def substitute(self, sample: SampleRef, attempt: int) -> SampleRef | None:
        """Another sample of the same task and window, to use if `sample` cannot be read. It is no longer than that.

        A function of its arguments alone; `attempt` numbers the substitutes, from 0. Returns None if there is none.
        """
        pool = self._phases[sample.phase].streams[sample.task].interleave.pools[sample.pool]
        costs = pool.window_costs(sample.position)
        fits = (costs.num_tokens <= sample.num_tokens) & (costs.num_visual <= sample.num_visual) & costs.usable
        shard = costs.shards.index((sample.url, sample.shard))
        is_sample = (costs.offset == sample.offset) & (costs.shard == shard)
        rows = np.flatnonzero(fits & ~is_sample)
        if not len(rows):
            return None
        seed = seed_of(self.data.seed, sample.epoch, sample.key, f"{sample.task} spare {attempt}")
        row = int(rows[seed % len(rows)])
        return make_sample_ref(costs, row, sample.task, sample.phase, sample.epoch, (sample.pool, sample.position))

    def source_name(self, sample: SampleRef) -> str:
        """Name of the source of a sample in metrics; empty where its task has only one source."""
        return self._phases[sample.phase].source_names[sample.task].get(sample.folder, "")

    def _configs_from(self, step: int) -> list[tuple[PhaseConfig, list[str]]]:
        """The phases that are not over after `step` steps, with their tasks."""
        return [(self._configs[p.number], list(p.shares)) for p in self._phases if p.end > step]

    def _positions_before(self, step: int) -> Positions:
        known = max((s for s in self._positions if s < step), default=None)
        if known is None:
            raise UserError(f"step {step} was asked for, but the stream goes on after step {min(self._positions)}")
        if self.data.samples_per_step:
            return self._advanced(self._positions[known], known, step - 1)
        for number in range(known + 1, step):
            self._positions[number] = self._compute(number, self._positions[number - 1])[1]
        return self._positions[step - 1]

    def _advanced(self, positions: Positions, step: int, last: int) -> Positions:
        """The positions after step `last`, where they are `positions` after `step`, for steps of a fixed number."""
        for phase in self._phases:
            steps = int(min(last, phase.end)) - max(step, phase.start)
            if steps > 0:
                positions = self._entered(phase, positions)
                pools = dict(positions.pools)
                for task, count in phase.counts.items():
                    stream = phase.streams[task]
                    pools |= stream.pool_cursors(stream.cursor(positions).advanced(steps * count))
                positions = replace(positions, pools=pools)
        return positions

    def _entered(self, phase: _Phase, positions: Positions) -> Positions:
        """The positions with all pools of a phase: those that it divides, and new ones at their first sample."""
        tokens = positions.tokens if positions.shares == phase.shares else {}
        pools = {pool: positions.pools.get(pool) or self._first_cursor(pool, positions) for pool in phase.pools}
        return Positions(pools, tokens, phase.shares)

    def _first_cursor(self, pool: Pool, positions: Positions) -> PoolCursor:
        """The cursor of a pool that is new: where the pool that it was divided from is, or at its first sample."""
        for wider, cursor in positions.pools.items():
            if pool.has_order_of(wider) and set(pool.kept) < set(wider.kept):
                cost_model = self._cost_models[pool.task]
                one, other = self._sources.shuffled(wider, cost_model), self._sources.shuffled(pool, cost_model)
                skipped = [
                    one.num_before(position, other)
                    for position in cursor.skipped
                    if one.num_before(position + 1, other) > one.num_before(position, other)
                ]
                return PoolCursor(one.num_before(cursor.next, other), tuple(skipped))
        return PoolCursor()

    def _phase(self, step: int) -> _Phase:
        return next(phase for phase in reversed(self._phases) if step > phase.start)

    def _compute(self, step: int, positions: Positions) -> tuple[StepPlan, Positions]:
        """The plan of a step, and the positions after it."""
        phase = self._phase(step)
        positions = self._entered(phase, positions)
        before = {task: stream.cursor(positions) for task, stream in phase.streams.items()}
        choose = self._fixed_count if phase.counts else self._fill_packs
        candidates, queues, slots = choose(step, phase, before)
        taken: list[list[int]] = [[] for _ in candidates]
        for slot in slots:
            for number, index in slot:
                taken[number].append(index)
        after, pools, tokens = dict(before), dict(positions.pools), dict(positions.tokens)
        for of_task, queue, indices in zip(candidates, queues, taken, strict=True):
            task = of_task.task
            if not phase.counts:
                tokens[task] = tokens.get(task, 0) + sum(queue.sizes[0][index] for index in indices)
            after[task] = before[task].after(of_task.positions, indices, tokens.get(task, 0))
            pools |= phase.streams[task].pool_cursors(after[task])
        costs, sizes = sums(queues, slots)
        plan = StepPlan(
            step=step,
            digest=_digest(candidates, slots, taken),
            straggler=max(costs) * len(costs) / sum(costs),
            filled=sum(size[0] for size in sizes) / (self.data.slots * self.data.pack_tokens),
            too_long=sum(int(c.too_long[indices].sum()) for c, indices in zip(candidates, taken, strict=True)),
            unsuitable=sum(int(c.unsuitable[indices].sum()) for c, indices in zip(candidates, taken, strict=True)),
            epoch=max(s.interleave.epochs(*_num_taken(after[task])) for task, s in phase.streams.items()),
            candidates=candidates,
            slot_items=slots,
        )
        return plan, Positions(pools, tokens, phase.shares)

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
        interleave = phase.streams[task].interleave
        return Candidates(task, phase.number, cursor.positions(num), interleave, cursor.offsets, self.data.seed)


def _digest(candidates: list[Candidates], slots: Slots, taken: list[list[int]]) -> str:
    """Hash of all samples in the order of the slots, so that it also tells which slot holds which sample."""
    lines = [iter(c.digest_lines(indices)) for c, indices in zip(candidates, taken, strict=True)]
    text = "\n".join(next(lines[number]) for slot in slots for number, _ in slot)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _num_taken(cursor: TaskCursor) -> tuple[int, tuple[int, ...]]:
    """Number of positions that were taken, and the offsets."""
    return cursor.next - len(cursor.skipped), cursor.offsets


def _shares(mix: MixConfig) -> dict[str, int]:
    """The task ratio in its lowest terms."""
    shares = task_shares(mix)
    divisor = math.gcd(*shares.values())
    return {task: share // divisor for task, share in shares.items()}
