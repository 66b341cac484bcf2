"""Turns the sources of a phase into streams of samples: which shards, which of their rows, and how to load them."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from data_pipelines.planner.costs import CostModel, SampleCosts, sample_costs
from data_pipelines.planner.shuffle import Shard, ShuffledShards, WeightedInterleave
from data_pipelines.shards.index import read_columns, read_manifest
from emma_train.config.schema import DataConfig, PhaseConfig, SourceConfig
from emma_train.errors import UserError
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.storage.shard_reader import ShardReader
from emma_train.storage.urls import display_url, join_url

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
]
"""Columns of the index that a plan needs."""


class Sources:
    """The manifests of a recipe's sources, each read once, and the streams made from them."""

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._storage, self._hash = ShardReader.from_config(data), hashlib.sha256()
        self._manifests: dict[str, dict[str, Any]] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of the shards and rows of all streams made so far."""
        return self._hash.hexdigest()[:16]

    def stream(self, phase: PhaseConfig, cost_model: CostModel) -> WeightedInterleave:
        """The samples of one task. Sources without weights are shuffled together; with weights each is a pool.

        Raises UserError if a source is missing, was indexed with another tokenizer, or has no sample of the task.
        """
        sources = [source for source in phase.sources if not source.tasks or cost_model.task in source.tasks]
        groups = [sources] if all(source.weight is None for source in sources) else [[source] for source in sources]
        pools = []
        for number, group in enumerate(groups):
            pool = self._pool(group, number, cost_model)
            if not pool.num_rows:
                folders = ", ".join(display_url(source.path) for source in group or phase.sources)
                raise UserError(
                    f"mix.{cost_model.task} is above 0, but no sample of {folders} has that task"
                    + " and the required tags" * any(s.require_tags or s.exclude_tags for s in group)
                )
            pools.append(pool)
        return WeightedInterleave(pools, [group[0].weight or 1.0 for group in groups])

    def _pool(self, sources: Sequence[SourceConfig], number: int, cost_model: CostModel) -> ShuffledShards:
        shards = []
        for index, source in enumerate(sources):
            for entry in self._manifest(source.path)["shards"]:
                tags = entry["tags"].get(TASKS[cost_model.task].record_key, {})
                num_rows = sum(num for names, num in tags.items() if has_wanted_tags(source, names.split("|")))
                self._hash.update(f"{entry['sha256']} {cost_model.task} {number} {num_rows}".encode())
                if num_rows:
                    hashes = entry["sha256"], entry["index_sha256"]
                    shards.append(Shard(source.path, entry["name"], *hashes, num_rows, entry["bytes"], index))
        name = cost_model.task if number == 0 else f"{cost_model.task} {number}"
        load = partial(_load, sources=sources, cost_model=cost_model, storage=self._storage)
        return ShuffledShards(shards, load, cost_model.seed, name, self._data.shuffle_window)

    def _manifest(self, folder: str) -> dict[str, Any]:
        if folder not in self._manifests:
            manifest = read_manifest(folder, self._storage)
            if manifest["tokenizer_sha256"] != self._tokenizer.sha256:
                path = self._tokenizer.path
                raise UserError(
                    f"{display_url(folder)}: was indexed with another tokenizer than data.tokenizer ({path}); "
                    f"run `emma-data index {display_url(folder)} --tokenizer {path}`"
                )
            self._manifests[folder] = manifest
        return self._manifests[folder]


def _load(
    shards: Sequence[Shard], epoch: int, sources: Sequence[SourceConfig], cost_model: CostModel, storage: ShardReader
) -> SampleCosts:
    """Costs of the rows that the sources select, shard after shard. Starts to fetch the shards, which are read soon.

    Raises UserError if an index has other rows than its manifest says.
    """
    tables, key = [], TASKS[cost_model.task].record_key
    for shard in shards:
        source = sources[shard.source]
        table = read_columns(shard.folder, shard.name, key, PLANNED, storage, shard.index_sha256)
        if source.require_tags or source.exclude_tags:
            table = table.filter(pa.array([has_wanted_tags(source, tags) for tags in table.column("tags").to_pylist()]))
        if len(table) != shard.num_rows:
            raise UserError(
                f"{display_url(shard.folder)}: the index of {shard.name} has {len(table)} {cost_model.task} rows, the "
                f"manifest says {shard.num_rows}; run `emma-data index` again"
            )
        tables.append(table)
    files = [(join_url(shard.folder, shard.name), shard.sha256) for shard in shards]
    storage.fetch_ahead(files, sum(shard.num_bytes for shard in shards))
    return sample_costs(tables, files, epoch, cost_model)


def has_wanted_tags(source: SourceConfig, tags: Sequence[str]) -> bool:
    """Whether a sample with these tags has all of the source's require_tags and none of its exclude_tags."""
    return set(source.require_tags) <= set(tags) and not set(source.exclude_tags) & set(tags)
