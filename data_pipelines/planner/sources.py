"""Turns the sources of a phase into streams of samples: which shards, which of their rows, and how to load them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from data_pipelines.planner.costs import CostModel, SampleCosts, sample_costs
from data_pipelines.planner.cursor import TaskCursor
from data_pipelines.planner.pools import (
    Pool,
    PoolCursor,
    Positions,
    SourcePart,
    choose_pools,
    content_id,
    next_epoch,
    source_parts,
)
from data_pipelines.planner.shuffle import Shard, ShuffledShards, WeightedInterleave, even_pattern, interleave_pattern
from data_pipelines.shards.excluded import refuse_names, refuse_provenance
from data_pipelines.shards.index import (
    CAPTIONS,
    MANIFEST,
    content_sha256,
    read_columns,
    read_manifest,
    shard_url,
)
from data_pipelines.shards.record_map import MAP_FILE, read_map
from emma_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from emma_train.errors import RunError, UserError
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.urls import display_url

PLANNED = [
    "key",
    "offset",
    "size",
    "crc32",
    "text_tokens",
    "context",
    "target",
    "widths",
    "heights",
    "tags",
    CAPTIONS,
]
"""Columns of the index that a plan needs."""


LABELS = {"stem", "general"}
"""Tags that label the images of a record for router tuning."""


@dataclass(frozen=True)
class TaskStream:
    """The samples of one task in a phase."""

    pools: list[Pool]
    interleave: WeightedInterleave
    """Of the pools, in their order."""

    def cursor(self, positions: Positions) -> TaskCursor:
        """The position of the stream where its pools are at their positions."""
        cursors = [positions.pools[pool] for pool in self.pools]
        position = sum(cursor.next for cursor in cursors)
        counts = self.interleave.counts_before(position)
        offsets = tuple(cursor.next - count for cursor, count in zip(cursors, counts, strict=True))
        skipped = sorted(
            self.interleave.position_of(number, skipped, offsets)
            for number, cursor in enumerate(cursors)
            for skipped in cursor.skipped
        )
        return TaskCursor(position, tuple(skipped), positions.tokens.get(self.pools[0].task, 0), offsets)

    def pool_cursors(self, cursor: TaskCursor) -> dict[Pool, PoolCursor]:
        """The inverse of `cursor`."""
        offsets = cursor.offsets or (0,) * len(self.pools)
        counts = self.interleave.counts_before(cursor.next)
        skipped = [self.interleave.locate(position, offsets) for position in cursor.skipped]
        return {
            pool: PoolCursor(count + offset, tuple(position for of_pool, position in skipped if of_pool == number))
            for number, (pool, count, offset) in enumerate(zip(self.pools, counts, offsets, strict=True))
        }


class Sources:
    """The manifests of a recipe's sources, each read once, and the streams made from them."""

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._storage = ShardReader.from_config(data)
        self._manifests: dict[str, dict[str, Any]] = {}
        self._shards: dict[tuple[str, ...], list[Shard]] = {}
        self._shuffled: dict[Pool, ShuffledShards] = {}

    @property
    def folders(self) -> list[str]:
        """Hash of the shards of each folder that was read, whatever its path."""
        return sorted({_hash(map(content_sha256, manifest["shards"])) for manifest in self._manifests.values()})

    def fingerprint(self, phases: Sequence[tuple[PhaseConfig, Sequence[str]]]) -> str:
        """Hash of the shards and rows of the tasks of some phases, as checkpoints of version 0.1.0 have it."""
        hashed = hashlib.sha256()
        for phase, tasks in phases:
            for task in tasks:
                for number, group in enumerate(_groups(phase, task)):
                    for source in group:
                        for entry in self._manifest(source.path)["shards"]:
                            num_rows = _num_rows(entry, source, task)
                            hashed.update(f"{content_sha256(entry)} {task} {number} {num_rows}".encode())
        return hashed.hexdigest()[:16]

    def stream(self, phase: PhaseConfig, cost_model: CostModel, known: Sequence[Pool]) -> tuple[TaskStream, list[Pool]]:
        """The samples of one task, and all pools that are known then. Sources without weights are shuffled together;
        with weights each is a pool. Rows of `known` pools stay in these.

        Raises UserError if a source is missing, was indexed with another tokenizer, or has no sample of the task.
        """
        task, data, repetitions = cost_model.task, self._data, Counter[str]()
        pools_of_groups: list[list[Pool]] = []
        groups = _groups(phase, task)
        for number, group in enumerate(groups):
            parts = source_parts([(source, self._shards_of(source, task)) for source in group], known, repetitions)
            if not parts:
                raise UserError(_no_rows(phase, group, task))
            name = task if number == 0 else f"{task} {number}"
            pools, known = choose_pools(task, parts, known, data.seed, data.shuffle_window, name)
            pools_of_groups.append(pools)
        weights = [group[0].weight or 1.0 for group in groups]
        pools = [pool for of_group in pools_of_groups for pool in of_group]
        shares = [
            weight * pool.num_rows / sum(other.num_rows for other in of_group)
            for weight, of_group in zip(weights, pools_of_groups, strict=True)
            for pool in of_group
        ]
        pattern = interleave_pattern(weights) if len(pools) == len(groups) else even_pattern(shares)
        shuffled = [self.shuffled(pool, cost_model) for pool in pools]
        return TaskStream(pools, WeightedInterleave(shuffled, pattern)), list(known)

    def shuffled(self, pool: Pool, cost_model: CostModel) -> ShuffledShards:
        """The rows of a pool in their order. Raises UserError if a part of it is in none of the folders."""
        if pool not in self._shuffled:
            shards: list[Shard] = []
            kept: list[bool] = []
            for part in pool.parts:
                of_part = self.shards_of_part(part, pool.task)
                if of_part is None:
                    raise UserError(f"{display_url(part.source.path)}: the shards are not those of the checkpoint")
                shards += of_part
                kept += [part in pool.kept] * len(of_part)
            load = partial(_load, cost_model=cost_model, storage=self._storage)
            self._shuffled[pool] = ShuffledShards(shards, load, pool.seed, pool.name, pool.window, kept)
        return self._shuffled[pool]

    def reopened(
        self, positions: Positions, phases: Sequence[tuple[PhaseConfig, Sequence[str]]]
    ) -> tuple[Positions, list[str]]:
        """The positions of a checkpoint with each part where it is now, for phases still to come, each with its tasks.

        Also returns a line for each pool whose order cannot be made again, because the manifest of a removed source is
        gone. The sources that are left of it start their next epoch.
        """
        located = self._located(phases, list(positions.pools))
        pools: dict[Pool, PoolCursor] = {}
        lines = []
        for pool, cursor in positions.pools.items():
            task, parts = pool.task, {part: located.get((pool.task, part.id), part) for part in pool.parts}
            kept = tuple(parts[part] for part in pool.kept)
            moved = replace(pool, parts=tuple(parts.values()), kept=kept)
            wanted = [part for part in kept if (task, part.id) in located]
            gone = [part for part in moved.parts if self.shards_of_part(part, task) is None]
            if wanted and gone:
                folders = ", ".join(dict.fromkeys(display_url(part.source.path) for part in gone))
                moved, cursor = next_epoch(moved, cursor, wanted)
                lines.append(
                    f"{task}: epoch {cursor.next // moved.num_rows - 1} cannot be finished without manifest.json of "
                    f"{folders}, as it was; what was shuffled with that source starts its next epoch"
                )
            pools[moved] = cursor
        return replace(positions, pools=pools), lines

    def _located(
        self, phases: Sequence[tuple[PhaseConfig, Sequence[str]]], known: Sequence[Pool]
    ) -> dict[tuple[str, str], SourcePart]:
        """The parts of all sources of some phases, by task and content."""
        return {
            (task, part.id): part
            for phase, tasks in phases
            for task in tasks
            for part in self._parts(phase, task, known)
        }

    def shards_of_part(self, part: SourcePart, task: str) -> list[Shard] | None:
        """The shards of a part; None if they are not where they were."""
        try:
            shards = self._shards_of(part.source, task, check_files=False)[part.first : part.first + part.num_shards]
        except (UserError, RunError):
            return None
        return shards if content_id(shards) == part.id.partition("#")[0] else None

    def _parts(self, phase: PhaseConfig, task: str, known: Sequence[Pool]) -> list[SourcePart]:
        sources = [source for group in _groups(phase, task) for source in group]
        return source_parts([(source, self._shards_of(source, task)) for source in sources], known, Counter())

    def _shards_of(self, source: SourceConfig, task: str, check_files: bool = True) -> list[Shard]:
        """The shards of a source with rows of a task, in the order of the manifest."""
        key = (task, source.path, "|".join(source.require_tags), "|".join(source.exclude_tags))
        if key not in self._shards:
            shards = []
            for entry in self._manifest(source.path, check_files)["shards"]:
                if num_rows := _num_rows(entry, source, task):
                    hashes = entry["sha256"], entry["index_sha256"]
                    tar = shard_url(source.path, entry) if "tar" in entry else ""
                    shards.append(Shard(source.path, entry["name"], *hashes, num_rows, entry["bytes"], source, tar))
            self._shards[key] = shards
        return self._shards[key]

    def check_labels(self, phase: PhaseConfig, tasks: Sequence[str]) -> None:
        """Raise UserError if no record of these tasks has a tag that labels its images for router tuning."""
        sources = [(source, task) for task in tasks for group in _groups(phase, task) for source in group]
        for source, task in sources:
            for entry in self._manifest(source.path)["shards"]:
                for names in entry["tags"].get(TASKS[task].record_key, {}):
                    tags = names.split("|")
                    if has_wanted_tags(source, tags) and LABELS & set(tags):
                        return
        folders = ", ".join(dict.fromkeys(display_url(source.path) for source, _ in sources))
        raise UserError(
            f"no image of {folders} has the tag stem or general, and data.untagged is unknown, so that router tuning "
            "would train nothing; tag the records, or set data.untagged=general"
        )

    def _manifest(self, folder: str, check_files: bool = True) -> dict[str, Any]:
        """The manifest of a folder. Where not `check_files`, its shards may be gone, and it counts for no hash."""
        if folder in self._manifests:
            return self._manifests[folder]
        if not check_files:
            return read_manifest(folder, self._storage, check_files=False)
        manifest = read_manifest(folder, self._storage)
        refuse_names([folder], display_url(folder))
        refuse_provenance(manifest.get("provenance"), display_url(folder))
        self._check_map(folder, manifest)
        if manifest["tokenizer_sha256"] != self._tokenizer.sha256:
            path = self._tokenizer.path
            raise UserError(
                f"{display_url(folder)}: was indexed with another tokenizer than data.tokenizer ({path}); "
                f"run `emma-data index {display_url(folder)} --tokenizer {path}`"
            )
        self._manifests[folder] = manifest
        return manifest

    def _check_map(self, folder: str, manifest: dict[str, Any]) -> None:
        """Raise UserError where the manifest was made with another map of records than the folder has now."""
        if any("tar" in entry for entry in manifest["shards"]):
            return  # a selection: the maps are those of the folders that have the tars
        record_map = read_map(folder, self._storage)
        if manifest.get("map") != (asdict(record_map) if record_map is not None else None):
            raise UserError(
                f"{display_url(folder)}: {MAP_FILE} is missing or is not the map in {MANIFEST}; copy it or index again"
            )


def _groups(phase: PhaseConfig, task: str) -> list[list[SourceConfig]]:
    """The sources of a task that are shuffled together: all of them, or each by itself if they have weights."""
    sources = [source for source in phase.sources if not source.tasks or task in source.tasks]
    return [sources] if all(source.weight is None for source in sources) else [[source] for source in sources]


def _num_rows(entry: dict[str, Any], source: SourceConfig, task: str) -> int:
    """Number of rows of a shard, given by its entry in the manifest, that a source selects."""
    tags = entry["tags"].get(TASKS[task].record_key, {})
    return sum(num for names, num in tags.items() if has_wanted_tags(source, names.split("|")))


def _no_rows(phase: PhaseConfig, group: Sequence[SourceConfig], task: str) -> str:
    folders = ", ".join(display_url(source.path) for source in group or phase.sources)
    by_tags = any(source.require_tags or source.exclude_tags for source in group)
    return f"mix.{task} is above 0, but no sample of {folders} has that task" + " and the required tags" * by_tags


def _hash(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _load(shards: Sequence[Shard], epoch: int, cost_model: CostModel, storage: ShardReader) -> SampleCosts:
    """Costs of the rows that the sources select, shard after shard. Starts to fetch the shards, which are read soon.

    Raises UserError if an index has other rows than its manifest says.
    """
    tables, key = [], TASKS[cost_model.task].record_key
    for shard in shards:
        source = shard.source
        table = read_columns(shard.folder, shard.name, key, PLANNED, storage, shard.index_sha256)
        if source is not None and (source.require_tags or source.exclude_tags):
            table = table.filter(pa.array([has_wanted_tags(source, tags) for tags in table.column("tags").to_pylist()]))
        if len(table) != shard.num_rows:
            raise UserError(
                f"{display_url(shard.folder)}: the index of {shard.name} has {len(table)} {cost_model.task} rows, the "
                f"manifest says {shard.num_rows}; run `emma-data index` again"
            )
        tables.append(table)
    files = [(shard.url, shard.sha256) for shard in shards]
    storage.fetch_ahead(files, sum(shard.num_bytes for shard in shards))
    return replace(sample_costs(tables, files, epoch, cost_model), folders=[shard.folder for shard in shards])


def has_wanted_tags(source: SourceConfig, tags: Sequence[str]) -> bool:
    """Whether a sample with these tags has all of the source's require_tags and none of its exclude_tags."""
    return set(source.require_tags) <= set(tags) and not set(source.exclude_tags) & set(tags)
