"""A public set in its own format: SOURCE -> OUT."""

import argparse
from dataclasses import replace
from pathlib import Path

from data_pipelines.commands.common_arguments import add_address, add_workers, check_workers, tokenizer_file
from data_pipelines.prepare.importers.catalogue import FORMATS
from emma_train.errors import UserError, check_range


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder that was downloaded, or one file of it")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with this source")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, for the index")
    parser.add_argument("--dataset", default="", help="name of the set, for keys and provenance")
    parser.add_argument("--licence", default="", help="licence of the set, for provenance")
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="tags of every record: stem, general, ...")
    parser.add_argument("--images", default="", help="folder or zip of the images, if they are not beside their list")
    parser.add_argument("--header-only", action="store_true", help="do not decode images to find the truncated ones")
    parser.add_argument("--shard-samples", type=int, default=10_000, help="records in a shard at most (%(default)s)")
    parser.add_argument("--shard-mib", type=int, default=256, help="size of a shard in MiB, about (%(default)s)")
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="FIELD=NAME",
        help="where the source has a field: caption=txt, turns=json[conversations], image=png,jpg, instruction=..., "
        "source=..., target=..., question=..., answer=..., id=...",
    )
    add_workers(parser)
    add_address(parser)


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.importers.import_source import import_source
    from data_pipelines.prepare.importers.item import ImportOptions
    from data_pipelines.prepare.importers.metadataset import blended_sets, is_metadataset, write_sources
    from data_pipelines.prepare.importers.source_files import check_source
    from data_pipelines.prepare.importers.write_part import ShardLimits
    from data_pipelines.shards.build_index import index_folder

    tokenizer, workers = tokenizer_file(arguments.tokenizer), check_workers(arguments)
    check_range("--shard-samples", arguments.shard_samples, 1, 1_000_000)
    check_range("--shard-mib", arguments.shard_mib, 1, 65_536)
    check_source(arguments.source)
    form, sets = FORMATS[arguments.importer], {}
    if arguments.importer == "energon" and is_metadataset(arguments.source):
        sets = blended_sets(arguments.source)
    options = ImportOptions(
        dataset=arguments.dataset or form.dataset,
        licence=arguments.licence or form.licence,
        tags=tuple(sorted(set(arguments.tags))),
        images=arguments.images,
        decode=not arguments.header_only,
        fields=_fields(arguments.map),
    )
    limits = ShardLimits(arguments.shard_samples, arguments.shard_mib << 20)

    def import_set(source: Path, out: Path, options: ImportOptions, **of_importer: str) -> int:
        parts = form.load()(source, options, **of_importer)
        provenance = import_source(arguments.importer, source, out, parts, options, limits, workers, arguments.address)
        return sum(index_folder(out, tokenizer, provenance, workers)["samples"].values())

    if not sets:
        import_set(arguments.source, arguments.out, options)
        return 0
    samples = {
        name: import_set(
            one.path, arguments.out / name, replace(options, dataset=arguments.dataset or name), split_part=one.part
        )
        for name, one in sets.items()
    }
    write_sources(arguments.out, sets, samples)
    return 0


def _fields(pairs: list[str]) -> dict[str, str]:
    """The values of --map. Raises UserError."""
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise UserError(f"--map {pair}: give FIELD=NAME, such as caption=txt")
        fields[name] = value
    return fields
