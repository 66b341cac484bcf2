"""New shards from existing ones (edits, text-edits), or from a file of texts (rendered-text); can be run again."""

import argparse
import sys
from pathlib import Path

from data_pipelines.commands.annotate import parse_settings
from data_pipelines.commands.common_arguments import (
    add_gpus,
    add_job_arguments,
    check_gpus,
    check_workers,
    tokenizer_file,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="edits, text-edits or rendered-text")
    parser.add_argument(
        "source", type=Path, metavar="SHARDS", help="a folder of shards; of rendered-text, a file of texts"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with this command")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, for the index")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="a setting")
    add_job_arguments(parser)
    add_gpus(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.jobs import JobOptions, ShardWork, run_job, unfinished
    from data_pipelines.prepare.synthesis import synthesize
    from data_pipelines.shards.build_index import index_folder
    from emma_train.storage.files import make_folder

    tokenizer, name, out = tokenizer_file(arguments.tokenizer), arguments.name, arguments.out
    work: ShardWork
    settings = tuple(parse_settings(arguments.settings).items())
    if name == synthesize.RENDERED_TEXT:
        tasks, work = synthesize.text_tasks(arguments.source, out, settings), synthesize.render_texts
        used = synthesize.changed_settings(synthesize.RENDERED_TEXT_SETTINGS, settings)
        not_identity: frozenset[str] = frozenset()
    else:
        choice = synthesize.SynthesisChoice(name, settings)
        tasks, work = synthesize.synthesis_tasks(arguments.source, out, choice), synthesize.synthesize_shard
        used, not_identity = choice.load().settings, choice.load().not_identity
    if arguments.dry_run:
        rest, counts = unfinished(tasks)
        sys.stdout.write(f"{name}: {len(tasks)} shards, {len(rest)} to do, {counts.kept:,} records made so far\n")
        return 0
    make_folder(out)
    options = JobOptions(check_workers(arguments), arguments.address, gpus=check_gpus(arguments))
    result = run_job(name, tasks, work, options)
    counts = result.counts
    sys.stdout.write(f"{name}: {counts.read:,} read, {counts.kept:,} made, {counts.rejected:,} rejected\n")
    for reason, number in synthesize.frequent_reasons(tasks):
        sys.stdout.write(f"{number:,} rejected: {reason} (all are in *.rejected.jsonl)\n")
    if not counts.kept:
        return 1
    provenance = synthesize.synthesis_provenance(arguments.source, name, used, not_identity)
    index_folder(out, tokenizer, provenance, 1)
    return 0
