"""The command `emma-data`: make data sets, check them, and show what is in them."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emma_train.config.secrets import without_secrets
from emma_train.errors import RunError, UserError, check_range

TINY_TOKENIZER = Path(__file__).parents[1] / "recipes" / "tiny" / "assets" / "tokenizer" / "tokenizer.json"

RANK_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""Environment variables that torchrun sets, and their values without torchrun."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 a check or storage failed, 2 bad usage or input."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code: int = arguments.run(arguments)
    except (UserError, RunError) as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2 if isinstance(error, UserError) else 1
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emma-data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    importing = commands.add_parser("import", help="a public source -> WebDataset shards with index and manifest")
    sources = importing.add_subparsers(required=True, metavar="SOURCE")
    add_fluent_emoji(sources.add_parser("fluent-emoji", help="named drawings of the npm package fluentui-emoji"))
    add_shards(sources.add_parser("shards", help="tars of others, as they are: paths, URLs, pipe:COMMAND"))

    index = commands.add_parser(
        "index", help="write the index and manifest of a folder of shards; goes on where it stopped"
    )
    index.add_argument("folder", type=Path)
    index.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, as data.tokenizer")
    add_workers(index)
    index.add_argument("--again", action="store_true", help="also shards whose index is valid")
    index.set_defaults(run=run_index)

    latents = commands.add_parser(
        "cache-latents", help="encode every image once; under torchrun the processes share the shards"
    )
    latents.add_argument("folder", type=Path)
    latents.add_argument("--autoencoder", type=Path, required=True, help="folder of a diffusers AutoencoderDC")
    modes = ("square", "crop", "native", "buckets")
    latents.add_argument("--mode", choices=modes, default="square", help="as in the recipe")
    latents.add_argument("--side", type=int, nargs="+", default=[512], help="as in the recipe; several are allowed")
    latents.add_argument("--max-tokens", type=int, default=4096, help="of native images, as in recipe (%(default)s)")
    latents.add_argument("--min-pixels", type=int, default=0, help="of native images, as in the recipe (%(default)s)")
    latents.add_argument("--batch-size", type=int, default=32, help="images encoded at once")
    latents.set_defaults(run=run_cache_latents)

    check = commands.add_parser("check", help="verify shards against their index and manifest; exit 1 on a difference")
    check.add_argument("folder", help="a path, or a URL that fsspec opens")
    add_workers(check)
    check.set_defaults(run=run_check)

    stats = commands.add_parser("stats", help="what a data set holds")
    stats.add_argument("folder", help="a path, or a URL that fsspec opens")
    stats.set_defaults(run=run_stats)
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")


def add_fluent_emoji(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--package", type=Path, help="unpacked fluentui-emoji (default: fetched with npm)")
    parser.add_argument(
        "--unicode-table", type=Path, help="data-by-emoji.json of unicode-emoji-json (default: fetched with npm)"
    )
    parser.add_argument("--world", choices=("tiny", "full"), default="full", help="64 concepts, or all of the package")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--samples", type=int, nargs=3, metavar=("SINGLES", "PAIRS", "STEM"), help="records of each kind in train"
    )
    parser.add_argument("--quality", type=int, default=70, help="WebP quality")
    parser.add_argument("--shard-samples", type=int, default=500, help="records per shard at most")
    parser.add_argument("--tokenizer", type=Path, default=TINY_TOKENIZER, help="tokenizer.json for the index")
    parser.set_defaults(run=run_import_fluent_emoji)


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder, or one that was begun with these sources")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="s3://b/set-{000..099}.tar, 'pipe:zcat old/{0..9}.tar.gz', ..."
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, or its folder, for the index")
    add_workers(parser)
    parser.set_defaults(run=run_import_shards)


def run_import_shards(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.build_index import index_folder
    from data_pipelines.shards.fetch import fetch_shards

    tokenizer = tokenizer_file(arguments.tokenizer)
    check_range("--workers", arguments.workers, 1, 4096)
    provenance = fetch_shards(arguments.out, arguments.sources, arguments.workers)
    index_folder(arguments.out, tokenizer, provenance, arguments.workers)
    return 0


def run_import_fluent_emoji(arguments: argparse.Namespace) -> int:
    from data_pipelines.emoji.concepts import WORLDS, Amounts
    from data_pipelines.emoji.npm import DRAWINGS, UNICODE_TABLE, fetch_package
    from data_pipelines.shards.build_index import index_folder

    try:
        from data_pipelines.emoji.build import BuildSettings, build_set, provenance
        from data_pipelines.emoji.drawings import read_catalogue
    except ModuleNotFoundError as error:
        raise UserError(f"importing drawings needs {error.name}; pip install 'emma-train[data]'") from error

    check_range("--size", arguments.size, 32, 2048)
    check_range("--quality", arguments.quality, 1, 100)
    check_range("--shard-samples", arguments.shard_samples, 1, 1_000_000)
    check_range("--seed", arguments.seed, 0, 2**63)
    tokenizer = tokenizer_file(arguments.tokenizer)
    world = WORLDS[arguments.world]
    if arguments.samples:
        for count in arguments.samples:
            check_range("--samples", count, 0, 100_000_000)
        world = replace(world, train=Amounts(*arguments.samples))
    with tempfile.TemporaryDirectory() as temporary:
        package = arguments.package or fetch_package(DRAWINGS, Path(temporary))
        table = arguments.unicode_table or fetch_package(UNICODE_TABLE, Path(temporary)) / "data-by-emoji.json"
        catalogue = read_catalogue(package, table)
        settings = BuildSettings(arguments.size, arguments.seed, arguments.quality, arguments.shard_samples)
        splits = build_set(catalogue, world, arguments.out, settings)
    for name in splits:
        index_folder(arguments.out / name, tokenizer, provenance(catalogue, world, settings, name))
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.build_index import index_folder

    tokenizer = tokenizer_file(arguments.tokenizer)
    check_range("--workers", arguments.workers, 1, 4096)
    for folder in shard_folders(arguments.folder):
        index_folder(folder, tokenizer, workers=arguments.workers, force=arguments.again)
    return 0


def run_cache_latents(arguments: argparse.Namespace) -> int:
    import torch

    from data_pipelines.shards.encode_latents import cache_latents
    from emma_train.config.schema import AutoencoderConfig, ImageConfig

    check_range("--batch-size", arguments.batch_size, 1, 65_536)
    autoencoder = AutoencoderConfig(path=str(arguments.autoencoder), chunk=arguments.batch_size)
    check_range("--max-tokens", arguments.max_tokens, 1, 262_144)
    check_range("--min-pixels", arguments.min_pixels, 0, 2**28)
    limits = {"max_tokens": arguments.max_tokens, "min_pixels": arguments.min_pixels}
    images = [ImageConfig(mode=arguments.mode, side=side, **limits) for side in arguments.side]
    rank, size, local = (int(os.environ.get(name, one)) for name, one in RANK_VARIABLES.items())
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    for folder in shard_folders(arguments.folder):
        cache_latents(folder, autoencoder, images, device, rank, size)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    from data_pipelines.shards.check import check_folder

    check_range("--workers", arguments.workers, 1, 4096)
    folders = readable_folders(arguments.folder)
    problems = [f"{name}: {p}" for name, folder in folders.items() for p in check_folder(folder, arguments.workers)]
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{', '.join(folders)}: {f'{len(problems)} problems' if problems else 'as the index says'}\n")
    return 1 if problems else 0


def run_stats(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.shards.stats import details, folder_stats, overview

    stats_by_name = {name: folder_stats(folder) for name, folder in readable_folders(arguments.folder).items()}
    console = Console()
    console.print(overview(arguments.folder, stats_by_name))
    for name, stats in stats_by_name.items():
        console.print(f"\n[bold]{name}[/bold]")
        for table in details(stats):
            console.print(table)
    return 0


def readable_folders(folder: str) -> dict[str, str]:
    """Folders of shards by name: those of `shard_folders`, or the URL of a remote folder."""
    from emma_train.storage.urls import display_url, is_local, local_path

    if not is_local(folder):
        return {display_url(folder): folder}
    return {path.name: str(path) for path in shard_folders(Path(local_path(folder)))}


def shard_folders(folder: Path) -> list[Path]:
    """The folder itself if it has shards, else its subfolders that have (the splits). Raises UserError if none has."""
    if any(folder.glob("*.tar")):
        return [folder]
    subfolders = sorted(path.parent for path in folder.glob("*/*.tar"))
    if not subfolders:
        raise UserError(f"{folder}: no *.tar in it or in its subfolders; give a folder of shards")
    return list(dict.fromkeys(subfolders))


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that --tokenizer names, or that lies in the folder it names. Raises UserError where there is
    none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--tokenizer {file}: no such file; give a tokenizer.json or its folder")
    return file
