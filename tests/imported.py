"""Runs an importer and reads what it wrote."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.prepare.importers.catalogue import FORMATS
from data_pipelines.prepare.importers.import_source import COUNTS_FILE, REJECTS_FILE, import_source
from data_pipelines.prepare.importers.item import ImportOptions
from data_pipelines.prepare.importers.write_part import ShardLimits
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.tar import groups
from tests.helpers import ASSETS


class Imported:
    """What an import wrote. Counts must add up, and the index must take every record."""

    def __init__(self, name: str, source: Path, out: Path, samples: int = 2, workers: int = 1, **options: Any) -> None:
        form = FORMATS[name]
        settings = ImportOptions(form.dataset, **options)
        parts = form.load()(source, settings)
        self.provenance = import_source(name, source, out, parts, settings, ShardLimits(samples), workers)
        self.members: list[dict[str, bytes]] = []
        self.columns: list[dict[str, Any]] = []
        for tar in sorted(out.glob("*.tar")):
            with open(tar, "rb") as file:
                records = list(groups(file))
            rows = pq.read_table(tar.with_suffix(".source.parquet")).to_pylist()
            assert [row.pop("key") for row in rows] == [group.key for group in records]
            self.members += [group.members for group in records]
            self.columns += rows
        self.records = [json.loads(members["json"]) for members in self.members]
        self.rejects = [json.loads(line) for line in (out / REJECTS_FILE).read_bytes().splitlines()]
        self.counts = json.loads((out / COUNTS_FILE).read_text())
        assert self.counts["items"] == len(self.records) + sum(reject["count"] for reject in self.rejects)
        self.manifest = index_folder(out, ASSETS / "tokenizer", self.provenance)
        assert sum(shard["left_out"] for shard in self.manifest["shards"]) == 0
