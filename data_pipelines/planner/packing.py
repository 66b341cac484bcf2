"""Distributes the samples of a step over its slots (packs). Pure functions on token counts and costs.

`deal` distributes a fixed number of samples. `fill` takes as many samples as fit into the slots, in the exact ratio of
the tasks, and exchanges samples for later ones of the same task to close gaps.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST_FILL = 0.975
"""Share of the token capacity that `fill` uses before it exchanges samples; exchanges use the rest."""
LEAST_FILL = 0.9
"""`fill` does not go below this share of the token capacity to make costs even."""
EVEN = 1.03
"""A packing is even enough if its costliest slot costs at most this many times the mean."""
EXCHANGES = 3
"""Exchanges per slot at most."""
CLOSE = 8
"""A gap of fewer tokens is not worth an exchange."""


@dataclass
class Queue:
    """Candidate samples of one task, in order: more than a step takes, so that there is a choice."""

    counts: list[int]
    """counts[u]: number of samples of this task if the step holds u units of the mix; 0, r, 2r, ... if the ratio is by
    samples."""
    sizes: list[list[int]]
    """sizes[c][i]: what sample i counts against cap c; cap 0 is LLM tokens."""
    costs: list[float]
    """costs[i]: forward work of sample i."""


SlotItem = tuple[int, int]
"""(index of a queue, index of a sample in it)."""
Slots = list[list[SlotItem]]
"""The samples of each slot."""


def deal(queues: Sequence[Queue], num_slots: int) -> Slots:
    """Distribute all samples, the same number of each queue to every slot.

    Goes in rounds of one sample per slot, costliest samples first; the costliest of a round goes to the lightest slot.
    """
    slots: Slots = [[] for _ in range(num_slots)]
    loads = np.zeros(num_slots)
    for number, queue in enumerate(queues):
        costs = np.asarray(queue.costs)
        order = np.argsort(-costs, kind="stable")
        for start in range(0, len(order), num_slots):
            samples = order[start : start + num_slots]
            # The last round may be shorter. Its samples go to the lightest slots: if they always went to the first
            # slots, these would collect the remainders of all tasks.
            lightest = np.argsort(loads, kind="stable")[: len(samples)]
            loads[lightest] += costs[samples]
            for slot, sample in zip(lightest.tolist(), samples.tolist(), strict=True):
                slots[slot].append((number, sample))
    return slots


def spread(queues: Sequence[Queue], num_slots: int, caps: Sequence[int]) -> Slots | None:
    """Distribute all samples within the caps, even if costs get uneven. Returns None if they do not fit."""
    full_queues = [Queue([0, len(q.costs)], q.sizes, q.costs) for q in queues]
    return _lightest_first(full_queues, 1, num_slots, caps)


def sums(queues: Sequence[Queue], slots: Slots) -> tuple[list[float], list[list[int]]]:
    """The cost of each slot, and the total size of each slot for each cap."""
    costs = [sum(queues[number].costs[sample] for number, sample in slot) for slot in slots]
    caps = range(len(queues[0].sizes))
    return costs, [[sum(queues[n].sizes[cap][sample] for n, sample in slot) for cap in caps] for slot in slots]


def look_ahead(num_slots: int) -> int:
    """Number of samples that a queue needs beyond those that a step takes."""
    return max(64, 2 * num_slots)


def fill(queues: Sequence[Queue], num_slots: int, caps: Sequence[int]) -> Slots | None:
    """Take as many units of the mix as fit into the slots, make costs even, and close gaps by exchanges.

    Takes at most the units that every queue has in its `counts`. Returns None if not even one unit fits. A sample in
    the first half of those that a queue gives is never exchanged, so no sample waits for more than a few steps.
    """
    most = _most_units(queues, num_slots, caps, FIRST_FILL)
    best: tuple[float, int, Slots] | None = None
    units = max(1, most)
    while units >= 1 and (best is None or units >= LEAST_FILL / FIRST_FILL * most):
        if (slots := _lightest_first(queues, units, num_slots, caps)) is not None:
            straggler = evenness(queues, slots)
            if best is None or straggler < best[0]:
                best = straggler, units, slots
            if straggler <= EVEN:
                break
        units -= max(1, units // 50)
    if best is None:
        return None
    _, units, slots = best
    _exchange(queues, units, slots, caps)
    return slots


def evenness(queues: Sequence[Queue], slots: Slots) -> float:
    """Cost of the costliest slot divided by the mean."""
    loads = [sum(queues[number].costs[sample] for number, sample in slot) for slot in slots]
    return max(loads) * len(loads) / sum(loads)


def _most_units(queues: Sequence[Queue], num_slots: int, caps: Sequence[int], share: float) -> int:
    """The largest number of units whose total size is at most this share of all slots' capacity, for every cap."""
    limit = min(len(q.counts) for q in queues) - 1
    for number, cap in enumerate(caps):
        totals = np.zeros(limit + 1, dtype=np.int64)
        for queue in queues:
            size_of_first = np.concatenate([[0], np.cumsum(queue.sizes[number])])
            totals += size_of_first[queue.counts[: limit + 1]]
        limit = int(np.searchsorted(totals, share * num_slots * cap, side="right")) - 1
    return limit


def _lightest_first(queues: Sequence[Queue], units: int, num_slots: int, caps: Sequence[int]) -> Slots | None:
    """Distribute the samples of `units` units, costliest first, each to the lightest slot that has room for it.

    Returns None if a sample finds no such slot.
    """
    items = [(number, sample) for number, queue in enumerate(queues) for sample in range(queue.counts[units])]
    costs = [queues[number].costs[sample] for number, sample in items]
    rooms = [[cap] * num_slots for cap in caps]
    slots: Slots = [[] for _ in range(num_slots)]
    heap = [(0.0, slot) for slot in range(num_slots)]
    for index in np.argsort(-np.asarray(costs), kind="stable").tolist():
        number, sample = items[index]
        sizes, full = queues[number].sizes, []
        while heap and not all(
            room[heap[0][1]] >= size[sample]
            for room, size in zip(rooms, sizes)  # noqa: B905 - strict is slow in this inner loop
        ):
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, slot = heap[0]
        slots[slot].append((number, sample))
        for room, size in zip(rooms, sizes):  # noqa: B905 - strict is slow in this inner loop
            room[slot] -= size[sample]
        heapq.heapreplace(heap, (load + costs[index], slot))
        for entry in full:
            heapq.heappush(heap, entry)
    return slots


def _exchange(queues: Sequence[Queue], units: int, slots: Slots, caps: Sequence[int]) -> None:
    """Close gaps of the slots, in place: exchange a sample for the longest later one of its task that fits and keeps
    the slot's cost within bounds."""
    ends = [queue.counts[units] for queue in queues]
    # Sorted by (tokens, -sample): of samples with equal tokens the earliest comes last, where bisect_right finds it.
    later = [
        sorted(
            (queue.sizes[0][sample], -sample)
            for sample in range(end, min(end + look_ahead(len(slots)), len(queue.costs)))
        )
        for queue, end in zip(queues, ends, strict=True)
    ]
    loads = [sum(queues[number].costs[sample] for number, sample in slot) for slot in slots]
    most_cost = max(max(loads), EVEN * sum(loads) / len(loads) / FIRST_FILL)
    for index, slot in enumerate(slots):
        room = [cap - sum(queues[n].sizes[c][sample] for n, sample in slot) for c, cap in enumerate(caps)]
        for _ in range(EXCHANGES):
            if room[0] < CLOSE:
                break
            best = _best_exchange(queues, ends, later, slot, room, most_cost - loads[index])
            if best is None:
                break
            item, entry = best
            number, old = slot[item]
            new, queue = -later[number].pop(entry)[1], queues[number]
            slot[item] = (number, new)
            room = [left - queue.sizes[c][new] + queue.sizes[c][old] for c, left in enumerate(room)]
            loads[index] += queue.costs[new] - queue.costs[old]


def _best_exchange(
    queues: Sequence[Queue],
    ends: list[int],
    later: list[list[tuple[int, int]]],
    slot: list[SlotItem],
    room: list[int],
    cost_room: float,
) -> tuple[int, int] | None:
    """The exchange that closes most of the gap: (index in the slot, index in its queue's `later`); None without one."""
    best, most = None, 0
    for index, (number, sample) in enumerate(slot):
        if not ends[number] // 2 <= sample < ends[number]:
            continue
        sizes, costs = queues[number].sizes, queues[number].costs
        num_tokens = sizes[0][sample]
        entry = bisect_right(later[number], (num_tokens + room[0], 1)) - 1
        if entry < 0 or later[number][entry][0] - num_tokens <= most:
            continue
        other = -later[number][entry][1]
        fits = all(sizes[c][other] - sizes[c][sample] <= room[c] for c in range(1, len(room)))
        if fits and costs[other] - costs[sample] <= cost_room:
            best, most = (index, entry), later[number][entry][0] - num_tokens
    return best
