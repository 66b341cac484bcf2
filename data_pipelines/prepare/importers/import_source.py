"""Imports a source: its parts in parallel, then the file of rejects, the counts, and provenance for the manifest."""

import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.prepare.importers.diagnosis import nothing_to_import, source_content
from data_pipelines.prepare.importers.item import ImportOptions, ImportPart
from data_pipelines.prepare.importers.source_files import listing_sha256
from data_pipelines.prepare.importers.write_part import (
    PROGRESS_FOLDER,
    ImportCounts,
    ShardLimits,
    part_progress,
    write_part,
)
from data_pipelines.prepare.job_progress import JobProgress
from data_pipelines.prepare.jobs import JobOptions, RecordCounts, ShardTask, run_job
from emma_train.errors import RunError, UserError
from emma_train.storage.files import make_folder, replacing, write_atomic

log = logging.getLogger(__name__)
REJECTS_FILE = "rejects.jsonl"
COUNTS_FILE = "import.json"
_SETTINGS_FILE = "settings.json"
NUM_REASONS = 1000


def import_source(
    importer: str,
    source: Path,
    out: Path,
    parts: list[ImportPart],
    options: ImportOptions,
    limits: ShardLimits,
    workers: int,
    address: str = "",
) -> dict[str, Any]:
    """Write the shards of all parts to `out`, with REJECTS_FILE and COUNTS_FILE; returns the provenance. The parts are
    read by `workers` processes of this machine, or of the Ray cluster at an address.

    The same source gives the same bytes, with any number of workers, and after any interruption. Raises UserError where
    `out` holds something else, where no item became a record, or where something is of the excluded set.
    """
    if out.absolute().is_relative_to(source.absolute()):
        raise UserError(f"{out}: lies in the source {source}; give a folder outside it")
    content = source_content(source)
    if not parts:
        raise nothing_to_import(importer, source, content)
    listing = listing_sha256(source)
    _claim(out, importer, listing, options, limits)
    write = _write_all if not address else partial(_write_on_cluster, address)
    counts = write(out, parts, options, limits, workers)
    first, reasons = _write_rejects(out, len(parts))
    write_atomic(out / COUNTS_FILE, json.dumps(asdict(counts), indent=1) + "\n")
    _report(out, counts, reasons)
    if not counts.records:
        raise UserError(f"{nothing_to_import(importer, source, content)}; the first item: {first}")
    origin = {
        "dataset": options.dataset,
        "licence": options.licence,
        "source": source.as_posix(),
        "listing_sha256": listing,
        "configs": _configs(parts),
    }
    return {"sources": [origin], "importer": importer, "counts": asdict(counts)}


def _claim(out: Path, importer: str, listing: str, options: ImportOptions, limits: ShardLimits) -> None:
    """Note what the folder is for. Raises UserError where it holds shards of another import."""
    settings = {"importer": importer, "listing_sha256": listing, **asdict(options), "limits": asdict(limits)}
    text = json.dumps({**settings, "fields": dict(options.fields)}, indent=1) + "\n"
    make_folder(out / PROGRESS_FOLDER)
    file = out / PROGRESS_FOLDER / _SETTINGS_FILE
    if file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{out}: holds an import of another source or with other options; give the same ones again, or a new "
                "folder"
            )
    elif any(out.glob("*.tar")):
        raise UserError(f"{out}: holds shards that this command did not write; give a new folder")
    write_atomic(file, text)


def _write_all(
    out: Path, parts: list[ImportPart], options: ImportOptions, limits: ShardLimits, workers: int
) -> ImportCounts:
    """Write the shards of all parts."""
    counts = ImportCounts()
    with JobProgress(str(out), len(parts), unit="parts") as progress:
        for of_part in _results(out, parts, options, limits, min(workers, len(parts))):
            counts += of_part
            progress.advance(of_part.items, of_part.rejected)
    return counts


def _write_on_cluster(
    address: str, out: Path, parts: list[ImportPart], options: ImportOptions, limits: ShardLimits, workers: int
) -> ImportCounts:
    """As `_write_all`, on a Ray cluster."""
    settings = (out / PROGRESS_FOLDER / _SETTINGS_FILE).read_text(encoding="utf-8")
    tasks = [
        ShardTask(
            part.name,
            out / PROGRESS_FOLDER / f"{number:05d}.done.json",
            (),
            {"part": part.name, "settings": settings},
            (out, number, part, options, limits),
        )
        for number, part in enumerate(parts)
    ]
    run_job(f"import to {out}", tasks, _write_task, JobOptions(workers, address))
    done = (shard.counts for number in range(len(parts)) for shard in part_progress(out, number))
    return sum(done, ImportCounts())


def _write_task(
    task: ShardTask, out: Path, number: int, part: ImportPart, options: ImportOptions, limits: ShardLimits
) -> RecordCounts:
    """The function of a job (`jobs.ShardWork`)."""
    counts = write_part(out, number, part, options, limits)
    return RecordCounts(counts.items, counts.records, counts.rejected)


def _results(
    out: Path, parts: list[ImportPart], options: ImportOptions, limits: ShardLimits, workers: int
) -> Iterator[ImportCounts]:
    try:
        if workers <= 1:
            yield from (write_part(out, number, part, options, limits) for number, part in enumerate(parts))
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(write_part, out, number, part, options, limits) for number, part in enumerate(parts)]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        raise RunError(
            f"{out}: an importing process died (out of memory?); run again with fewer --workers, it goes on"
        ) from None
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error}); run again, it goes on") from None


def _configs(parts: list[ImportPart]) -> list[str]:
    """The folders of the parts' files, without `data`."""
    folders = ("/".join(step for step in part.name.split("/")[:-1] if step != "data") for part in parts)
    return sorted(set(filter(None, folders)))


def _write_rejects(out: Path, num_parts: int) -> tuple[str, Counter[str]]:
    """Write REJECTS_FILE from what each part noted; returns the first reject, and how many have each reason (of the
    first NUM_REASONS reasons: those with names of files in them are without end)."""
    first, reasons = "", Counter[str]()
    with replacing(out / REJECTS_FILE) as file:
        for number in range(num_parts):
            for item, reason, count in (reject for shard in part_progress(out, number) for reject in shard.rejects):
                line = json.dumps({"item": item, "reason": reason, "count": count}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
                first = first or f"{item}: {reason}"
                if reason in reasons or len(reasons) < NUM_REASONS:
                    reasons[reason] += max(count, 1)
    return first, reasons


def _report(out: Path, counts: ImportCounts, reasons: Counter[str]) -> None:
    log.info(
        "%s: %d items = %d records (%d of them text only) in %d shards + %d rejected",
        *(out, counts.items, counts.records, counts.text_only, counts.shards, counts.rejected),
    )
    if counts.broken_files:
        log.warning("%s: %d files break off or cannot be read; copy them again", out, counts.broken_files)
    for reason, count in reasons.most_common(5):
        log.warning("%s: %d rejected: %s (all are in %s)", out, count, reason, REJECTS_FILE)
