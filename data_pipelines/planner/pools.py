"""Pools: the rows that a task draws from and that are shuffled together. Content identifies a pool, not its path.

A stream continues pools that it has read before, each at its stored position, and starts new pools at position 0. So a
change of the mix, the phases, the weights or the sources repeats no sample of an epoch and loses none. If a change
separates the sources of a pool, the pool is divided, and both parts keep the order that they had together.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipelines.planner.shuffle import Shard
from emma_train.config.schema import SourceConfig


@dataclass(frozen=True)
class SourcePart:
    """Consecutive shards of a source, as one task uses them. Two parts are equal if their content is."""

    id: str
    """Hash of the shards and their numbers of rows; "#n" follows for the n-th repetition of a part in a stream."""
    num_shards: int
    num_rows: int
    source: SourceConfig = field(compare=False)
    first: int = field(compare=False)
    """Index of the first shard among those of the source that have rows of the task."""


@dataclass(frozen=True)
class Pool:
    """Rows of one task that are shuffled together."""

    task: str
    name: str
    """Seeds the order, with `seed`."""
    seed: int
    window: int
    """Fewest rows in a shuffle window."""
    parts: tuple[SourcePart, ...]
    """What the order was made from."""
    kept: tuple[SourcePart, ...]
    """The parts that are read; the order skips the rows of the others."""

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.kept)

    def narrowed(self, kept: Sequence[SourcePart]) -> "Pool":
        """The same order with fewer rows."""
        return replace(self, kept=tuple(part for part in self.kept if part in kept))

    def has_order_of(self, other: "Pool") -> bool:
        return replace(self, kept=()) == replace(other, kept=())


@dataclass(frozen=True, slots=True)
class PoolCursor:
    """How far a pool has been read."""

    next: int = 0
    """First position after all taken ones."""
    skipped: tuple[int, ...] = ()
    """Positions below `next` that are not taken yet, in order."""


@dataclass(frozen=True)
class Positions:
    """How far a run has read its data."""

    pools: dict[Pool, PoolCursor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    """LLM tokens taken of each task since the mix was last changed; used if the mix is by tokens."""
    shares: dict[str, int] = field(default_factory=dict)
    """The mix for which `tokens` are counted."""

    def state(self) -> dict[str, Any]:
        """As a checkpoint stores it: plain values, about 100 bytes per pool and source."""
        used = [part.source for pool in self.pools for part in pool.parts]
        sources = list(dict.fromkeys(_source_values(source) for source in used))
        pools = []
        for pool, cursor in self.pools.items():
            content = [(part.id, part.num_shards, part.num_rows) for part in pool.parts]
            location = [(sources.index(_source_values(part.source)), part.first) for part in pool.parts]
            pools.append(
                {
                    **{key: getattr(pool, key) for key in ("task", "name", "seed", "window")},
                    "parts": [[*values, *where] for values, where in zip(content, location, strict=True)],
                    "kept": [pool.parts.index(part) for part in pool.kept],
                    "next": cursor.next,
                    "left": list(cursor.skipped),
                }
            )
        table = [[path, list(required), list(excluded)] for path, required, excluded in sources]
        return {"sources": table, "pools": pools, "tokens": self.tokens, "mix": self.shares}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Positions":
        """The inverse of `state`."""
        sources = [SourceConfig(path, [], required, excluded) for path, required, excluded in state["sources"]]
        pools = {}
        for values in state["pools"]:
            parts = tuple(
                SourcePart(content, num_shards, num_rows, sources[source], first)
                for content, num_shards, num_rows, source, first in values["parts"]
            )
            kept = tuple(parts[index] for index in values["kept"])
            pool = Pool(values["task"], values["name"], values["seed"], values["window"], parts, kept)
            pools[pool] = PoolCursor(values["next"], tuple(values["left"]))
        return cls(pools, dict(state["tokens"]), dict(state["mix"]))


def source_parts(
    sources: Sequence[tuple[SourceConfig, Sequence[Shard]]], known: Sequence[Pool], repetitions: Counter[str]
) -> list[SourcePart]:
    """The parts of some sources, given by their shards. Shards that are a part of a known pool are one part again.

    So a folder with new shards at its end is its former part and a new one. `repetitions` counts the parts of the
    stream so far.
    """
    lengths = sorted({part.num_shards for pool in known for part in pool.parts}, reverse=True)
    known_ids = {(part.id.partition("#")[0], part.num_shards) for pool in known for part in pool.parts}
    parts = []
    for source, shards in sources:
        first = 0
        while first < len(shards):
            rest = len(shards) - first
            fitting = (num for num in lengths if num <= rest)
            matches = (num for num in fitting if (content_id(shards[first : first + num]), num) in known_ids)
            num = next(matches, rest)
            of_part = shards[first : first + num]
            content = content_id(of_part)
            number, repetitions[content] = repetitions[content], repetitions[content] + 1
            name = f"{content}#{number}" if number else content
            parts.append(SourcePart(name, num, sum(shard.num_rows for shard in of_part), source, first))
            first += num
    return parts


def content_id(shards: Sequence[Shard]) -> str:
    """Hash of the content of some shards and of the numbers of their rows that are used."""
    text = "\n".join(f"{shard.content} {shard.num_rows}" for shard in shards)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def choose_pools(
    task: str, parts: Sequence[SourcePart], known: Sequence[Pool], seed: int, window: int, name: str
) -> tuple[list[Pool], list[Pool]]:
    """The pools of sources that are shuffled together, and all known pools after this choice.

    Known pools go on with those of their parts that are wanted; the other parts make one new pool.
    """
    chosen: list[Pool] = []
    after: list[Pool] = []
    rest = list(parts)
    for pool in known:
        wanted = [part for part in pool.kept if part in rest] if pool.task == task else []
        if not wanted:
            after.append(pool)
            continue
        rest = [part for part in rest if part not in wanted]
        chosen.append(pool.narrowed(wanted))
        after += _divided(pool, wanted)
    if rest:
        new = Pool(task, name, seed, window, tuple(rest), tuple(rest))
        chosen.append(new)
        after.append(new)
    return chosen, after


def next_epoch(pool: Pool, cursor: PoolCursor, available: Sequence[SourcePart]) -> tuple[Pool, PoolCursor]:
    """A pool of the available parts alone, at the start of the epoch after the one that `cursor` is in."""
    parts = tuple(part for part in pool.kept if part in available)
    new = replace(pool, parts=parts, kept=parts)
    return new, PoolCursor((cursor.next // pool.num_rows + 1) * new.num_rows)


def _divided(pool: Pool, wanted: Sequence[SourcePart]) -> Iterator[Pool]:
    yield pool.narrowed(wanted)
    if others := [part for part in pool.kept if part not in wanted]:
        yield pool.narrowed(others)


def _source_values(source: SourceConfig) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return source.path, tuple(source.require_tags), tuple(source.exclude_tags)
