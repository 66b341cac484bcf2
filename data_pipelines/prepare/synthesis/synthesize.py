"""Writes the shards of a synthesis: one for each input shard, of the same name; can be killed and run again."""

import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipelines.prepare.annotate import content_hash, stored_records
from data_pipelines.prepare.jobs import RecordCounts, ShardTask, writing
from data_pipelines.prepare.operator import Operator, Rejected
from data_pipelines.prepare.synthesis.rendered_text import RENDERED_TEXT_SETTINGS, TextRenderer, read_texts
from data_pipelines.prepare.synthesis.synthetic_record import Synthesis, SynthesisOutcome, Synthesize
from data_pipelines.shards.index import read_manifest, shard_url
from data_pipelines.shards.write import compact_json, tar_writer
from emma_train.errors import UserError

log = logging.getLogger(__name__)
SYNTHESES = {
    "edits": "data_pipelines.prepare.synthesis.edit_pairs:EDITS_SYNTHESIS",
    "text-edits": "data_pipelines.prepare.synthesis.text_edits:TEXT_EDITS_SYNTHESIS",
}
"""Where each synthesis from shards is defined, as module:variable."""
RENDERED_TEXT = "rendered-text"
TEXTS_PER_SHARD = 1000


@dataclass(frozen=True)
class SynthesisChoice:
    """A synthesis as the command line names it, small enough to be sent to workers."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Synthesis:
        """Raises UserError."""
        if self.name not in SYNTHESES:
            raise UserError(f"synthesize {self.name}: there is {', '.join((*SYNTHESES, RENDERED_TEXT))}")
        module, _, variable = SYNTHESES[self.name].partition(":")
        synthesis: Synthesis = getattr(importlib.import_module(module), variable)
        return replace(synthesis, settings=changed_settings(synthesis.settings, self.settings))


def changed_settings(defaults: Mapping[str, Any], changes: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    """Settings with changes, checked as those of operators are. Raises UserError."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in changes}
    checked = Operator("synthesize", 1, {}, lambda settings: lambda records: {}, defaults).with_settings(values)
    return MappingProxyType(dict(checked.settings))


def synthesis_tasks(folder: Path, out: Path, choice: SynthesisChoice) -> list[ShardTask]:
    """One task for each shard of a folder. Raises UserError."""
    synthesis, tasks = choice.load(), []
    files = {name: content_hash(synthesis.settings[name]) for name in sorted(synthesis.files)}
    settings = {key: value for key, value in synthesis.settings.items() if key not in synthesis.not_identity}
    for entry in read_manifest(folder)["shards"]:
        fingerprint = {
            "synthesis": synthesis.name,
            "version": synthesis.version,
            "settings": settings,
            "files": files,
            "shard_sha256": entry["sha256"],
            "index_sha256": entry["index_sha256"],
        }
        tar = folder / entry["name"]
        arguments, num_rows = (tar, shard_url(folder, entry), choice), sum(entry["rows"].values())
        tasks.append(_task(str(tar), out / entry["name"], fingerprint, arguments, num_rows))
    return tasks


def text_tasks(file: Path, out: Path, settings: tuple[tuple[str, Any], ...]) -> list[ShardTask]:
    """One task for each thousand texts of a file. Raises UserError."""
    values = changed_settings(RENDERED_TEXT_SETTINGS, settings)
    files = {name: content_hash(values[name]) for name in ("fonts", "weights")}
    tasks: list[ShardTask] = []
    texts = read_texts(file)
    while batch := tuple(islice(texts, TEXTS_PER_SHARD)):
        tar = out / f"shard-{len(tasks):06d}.tar"
        fingerprint = {
            "synthesis": RENDERED_TEXT,
            "version": 1,
            "settings": dict(values),
            "files": files,
            "texts": batch,
        }
        tasks.append(_task(str(tar), tar, fingerprint, (batch, settings), len(batch)))
    if not tasks:
        raise UserError(f"{file}: has no text; write one a line")
    return tasks


def synthesize_shard(task: ShardTask, tar: Path, records_tar: str, choice: SynthesisChoice) -> RecordCounts:
    """Write the shard that is made of one input shard, whose records are in `records_tar`. The function of a job
    (`jobs.ShardWork`)."""
    synthesis, synthesize = _started(choice)
    with open(records_tar, "rb") as shard:
        records = stored_records(tar, shard, {})

        def outcomes() -> Iterator[tuple[str, SynthesisOutcome]]:
            while batch := list(islice(records, synthesis.batch_size)):
                yield from zip((record.key for record in batch), synthesize(batch), strict=True)

        return write_outcomes(task, ((f"{key}-{synthesis.name}", outcome) for key, outcome in outcomes()))


def render_texts(task: ShardTask, texts: Sequence[str], settings: tuple[tuple[str, Any], ...]) -> RecordCounts:
    """Write the shard of some texts. The function of a job (`jobs.ShardWork`)."""
    renderer, name = _renderer(settings), Path(task.name).stem
    keys = [f"{name.replace('shard', 'text')}-{number:06d}" for number in range(len(texts))]
    return write_outcomes(task, ((key, renderer(key, text)) for key, text in zip(keys, texts, strict=True)))


def write_outcomes(task: ShardTask, outcomes: Iterator[tuple[str, SynthesisOutcome]]) -> RecordCounts:
    """Write the records to the task's shard and the others, with their reasons, to its file of rejects. A shard without
    a record is not written."""
    tar, rejected_file = task.outputs
    num_read, rejects = 0, []
    with writing(tar) as path, open(path, "wb") as stream:
        writer = tar_writer(stream)
        for key, outcome in outcomes:
            num_read += 1
            if isinstance(outcome, Rejected):
                rejects.append({"key": key, "reason": outcome.reason})
            else:
                writer.write({"__key__": key, "json": compact_json(dict(outcome.record)), **outcome.images})
        writer.close()
        stream.flush()
    if len(rejects) == num_read:
        tar.unlink()
    with writing(rejected_file) as path:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects), encoding="utf-8")
    return RecordCounts(num_read, num_read - len(rejects), len(rejects))


def frequent_reasons(tasks: Sequence[ShardTask], num: int = 3) -> list[tuple[str, int]]:
    """The most frequent reasons in the files of rejects of finished tasks, and how many records have each."""
    reasons = Counter[str]()
    for task in tasks:
        with suppress(FileNotFoundError), open(task.outputs[1], "rb") as file:
            reasons.update(json.loads(line)["reason"] for line in file)
    return reasons.most_common(num)


def synthesis_provenance(source: Path, name: str, settings: Mapping[str, Any], not_identity: frozenset[str]) -> dict:
    """For the manifest: that of the source, and what was made of it how."""
    made = {"name": name, "settings": {key: value for key, value in settings.items() if key not in not_identity}}
    if name == RENDERED_TEXT:
        return {"sources": [{"dataset": RENDERED_TEXT, "texts": source.name}], "synthesis": made}
    return {**read_manifest(source).get("provenance", {}), "synthesis": made}


def _task(name: str, tar: Path, fingerprint: dict[str, Any], arguments: tuple[Any, ...], num_rows: int) -> ShardTask:
    outputs = tar, tar.with_name(f"{tar.stem}.rejected.jsonl")
    return ShardTask(name, tar.with_name(f"{tar.stem}.done.json"), outputs, fingerprint, arguments, num_rows)


@lru_cache(maxsize=1)
def _started(choice: SynthesisChoice) -> tuple[Synthesis, Synthesize]:
    synthesis = choice.load()
    return synthesis, synthesis.start(synthesis.settings)


@lru_cache(maxsize=1)
def _renderer(settings: tuple[tuple[str, Any], ...]) -> TextRenderer:
    return TextRenderer(changed_settings(RENDERED_TEXT_SETTINGS, settings))
