"""Samples into slots: pure functions on token counts and costs, which decide what a step holds and how evenly.

`deal` spreads a given number of samples. `fill` takes as many as the slots hold, in the exact ratio of the tasks, and
looks ahead in each task's queue for samples that fill the gaps.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST_FILL = 0.975
"""Share of the token slots that heads of the queues take; exchanges bring the rest."""
LEAST_FILL = 0.9
EVEN = 1.03
"""Cost of the heaviest slot over the mean that packing is content with."""
EXCHANGES = 3
"""Samples of one slot that may be exchanged for longer ones."""
CLOSE = 8
"""Tokens of a gap that is not worth an exchange."""


@dataclass
class Queue:
    """What a task offers to a step, in the order in which it should go; more than are taken, to choose from."""

    counts: list[int]
    """Samples that so many units of the step take, from none on: 0, r, 2r, ... for a ratio by samples."""
    sizes: list[list[int]]
    """Of each sample, one list per cap; LLM tokens first."""
    costs: list[float]


Slots = list[list[tuple[int, int]]]
"""(queue, place in the queue) of the samples of each slot."""


def deal(queues: Sequence[Queue], num_slots: int) -> Slots:
    """Every sample of every queue, as many of a queue to each slot: round by round, costliest first, the costliest of a
    round to the lightest slot."""
    slots: Slots = [[] for _ in range(num_slots)]
    loads = np.zeros(num_slots)
    for number, queue in enumerate(queues):
        costs = np.asarray(queue.costs)
        order = np.argsort(-costs, kind="stable")
        for start in range(0, len(order), num_slots):
            places = order[start : start + num_slots]
            # The last round may not reach every slot; light ones take it, fixed ones would collect those of all tasks.
            lightest = np.argsort(loads, kind="stable")[: len(places)]
            loads[lightest] += costs[places]
            for slot, place in zip(lightest.tolist(), places.tolist(), strict=True):
                slots[slot].append((number, place))
    return slots


def spread(queues: Sequence[Queue], num_slots: int, caps: Sequence[int]) -> Slots | None:
    """Every sample of every queue under the caps, whatever it does to evenness; None where they do not fit."""
    whole = [Queue([0, len(q.costs)], q.sizes, q.costs) for q in queues]
    return _lightest_first(whole, 1, num_slots, caps)


def sums(queues: Sequence[Queue], slots: Slots) -> tuple[list[float], list[list[int]]]:
    """Cost of each slot, and its sizes under each cap."""
    costs = [sum(queues[number].costs[place] for number, place in slot) for slot in slots]
    dimensions = range(len(queues[0].sizes))
    return costs, [[sum(queues[n].sizes[d][place] for n, place in slot) for d in dimensions] for slot in slots]


def look_ahead(num_slots: int) -> int:
    """Samples that a queue holds beyond those that a step takes."""
    return max(64, 2 * num_slots)


def fill(queues: Sequence[Queue], num_slots: int, caps: Sequence[int]) -> Slots | None:
    """As many units as the slots hold under the caps, evened by cost and filled up by exchange; None where not even
    one unit fits. Queues whose `counts` end before the slots are full give no more than that.

    A sample of the first half of what a queue gives is never exchanged, so that none waits longer than a few steps.
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


def _most_units(queues: Sequence[Queue], num_slots: int, caps: Sequence[int], share: float) -> int:
    """Units whose sizes add up to at most this share of all slots, for every cap."""
    limit = min(len(q.counts) for q in queues) - 1
    for dimension, cap in enumerate(caps):
        totals = np.zeros(limit + 1, dtype=np.int64)
        for queue in queues:
            upto = np.concatenate([[0], np.cumsum(queue.sizes[dimension])])
            totals += upto[queue.counts[: limit + 1]]
        limit = int(np.searchsorted(totals, share * num_slots * cap, side="right")) - 1
    return limit


def _lightest_first(queues: Sequence[Queue], units: int, num_slots: int, caps: Sequence[int]) -> Slots | None:
    """The heads of the queues, costliest first, each to the lightest slot that has room; None where one finds none."""
    names = [(number, place) for number, queue in enumerate(queues) for place in range(queue.counts[units])]
    costs = [queues[number].costs[place] for number, place in names]
    room = [[cap] * num_slots for cap in caps]
    slots: Slots = [[] for _ in range(num_slots)]
    heap = [(0.0, slot) for slot in range(num_slots)]
    for index in np.argsort(-np.asarray(costs), kind="stable").tolist():
        number, place = names[index]
        sizes, full = queues[number].sizes, []
        while heap and not all(left[heap[0][1]] >= of[place] for left, of in zip(room, sizes)):  # noqa: B905 - hot
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, slot = heap[0]
        slots[slot].append((number, place))
        for left, of in zip(room, sizes):  # noqa: B905 - hot
            left[slot] -= of[place]
        heapq.heapreplace(heap, (load + costs[index], slot))
        for entry in full:
            heapq.heappush(heap, entry)
    return slots


def _exchange(queues: Sequence[Queue], units: int, slots: Slots, caps: Sequence[int]) -> None:
    """Fill the slots' gaps in place: a sample makes way for the longest later one of its task that fits and leaves the
    slot's cost within bounds."""
    ends = [queue.counts[units] for queue in queues]
    # The oldest of those with as many tokens stands last, where bisect finds it.
    later = [
        sorted(
            (queue.sizes[0][place], -place) for place in range(end, min(end + look_ahead(len(slots)), len(queue.costs)))
        )
        for queue, end in zip(queues, ends, strict=True)
    ]
    loads = [sum(queues[number].costs[place] for number, place in slot) for slot in slots]
    most_cost = max(max(loads), EVEN * sum(loads) / len(loads) / FIRST_FILL)
    for index, slot in enumerate(slots):
        room = [cap - sum(queues[n].sizes[d][p] for n, p in slot) for d, cap in enumerate(caps)]
        for _ in range(EXCHANGES):
            if room[0] < CLOSE:
                break
            best = _best_exchange(queues, ends, later, slot, room, most_cost - loads[index])
            if best is None:
                break
            at, entry = best
            number, place = slot[at]
            other, queue = -later[number].pop(entry)[1], queues[number]
            slot[at] = (number, other)
            room = [left - queue.sizes[d][other] + queue.sizes[d][place] for d, left in enumerate(room)]
            loads[index] += queue.costs[other] - queue.costs[place]


def _best_exchange(
    queues: Sequence[Queue],
    ends: list[int],
    later: list[list[tuple[int, int]]],
    slot: list[tuple[int, int]],
    room: list[int],
    cost_room: float,
) -> tuple[int, int] | None:
    """(place in the slot, entry of its queue's `later`) of the exchange that fills most."""
    best, most = None, 0
    for at, (number, place) in enumerate(slot):
        if not ends[number] // 2 <= place < ends[number]:
            continue
        sizes, costs = queues[number].sizes, queues[number].costs
        size = sizes[0][place]
        entry = bisect_right(later[number], (size + room[0], 1)) - 1
        if entry < 0 or later[number][entry][0] - size <= most:
            continue
        other = -later[number][entry][1]
        fits = all(sizes[d][other] - sizes[d][place] <= room[d] for d in range(1, len(room)))
        if fits and costs[other] - costs[place] <= cost_room:
            best, most = (at, entry), later[number][entry][0] - size
    return best


def evenness(queues: Sequence[Queue], slots: Slots) -> float:
    """Cost of the heaviest slot over the mean."""
    loads = [sum(queues[number].costs[place] for number, place in slot) for slot in slots]
    return max(loads) * len(loads) / sum(loads)
