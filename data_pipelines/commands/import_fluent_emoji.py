"""Named drawings of the npm package fluentui-emoji."""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from data_pipelines.commands.common_arguments import tokenizer_file
from emma_train.errors import UserError, check_range
from emma_train.storage.files import make_folder

TABLE = "data-by-emoji.json"
TINY_TOKENIZER = Path(__file__).parents[2] / "recipes" / "tiny" / "assets" / "tokenizer" / "tokenizer.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty or new folder")
    parser.add_argument(
        "--package",
        type=Path,
        help="fluentui-emoji, unpacked or as .tgz (default: fetched with npm); "
        "recipes/tiny/assets/emoji/drawings.tgz has the drawings of the tiny worlds",
    )
    parser.add_argument(
        "--unicode-table",
        type=Path,
        help="data-by-emoji.json of unicode-emoji-json (default: the package's, or fetched with npm)",
    )
    parser.add_argument(
        "--world",
        choices=("tiny", "tiny-scenes", "full"),
        default="full",
        help="64 concepts, the same in scenes of several drawings, or all of the package",
    )
    parser.add_argument(
        "--answers",
        choices=("direct", "steps"),
        default="direct",
        help="steps: answers about sums, charts, counts and groups first say what they go by (%(default)s)",
    )
    parser.add_argument(
        "--chinese",
        action="store_true",
        help="questions and answers in Chinese too, beside the English ones (tiny worlds)",
    )
    parser.add_argument("--size", type=int, default=128, help="image side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--samples", type=int, nargs=3, metavar=("SINGLES", "PAIRS", "STEM"), help="records of each kind in train"
    )
    parser.add_argument("--quality", type=int, default=70, help="WebP quality")
    parser.add_argument("--shard-samples", type=int, default=500, help="records per shard at most")
    parser.add_argument("--tokenizer", type=Path, default=TINY_TOKENIZER, help="tokenizer.json for the index")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.emoji.concepts import WORLDS, Amounts
    from data_pipelines.emoji.npm import DRAWINGS, UNICODE_TABLE, fetch_package, unpack
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
    world = replace(WORLDS[arguments.world], in_steps=arguments.answers == "steps", chinese=arguments.chinese)
    if arguments.chinese and arguments.answers == "steps":
        raise UserError("--chinese has direct answers alone; leave out --answers steps")
    if arguments.samples:
        for count in arguments.samples:
            check_range("--samples", count, 0, 100_000_000)
        singles, pairs, stem = arguments.samples
        world = replace(world, train=Amounts(singles, pairs, stem, world.train.scenes))
    with tempfile.TemporaryDirectory() as temporary:
        package = arguments.package or fetch_package(DRAWINGS, Path(temporary))
        if package.is_file():
            package = unpack(package, Path(temporary) / "drawings")
        table = arguments.unicode_table or package / TABLE
        if not table.exists() and not arguments.unicode_table:
            table = fetch_package(UNICODE_TABLE, Path(temporary)) / TABLE
        catalogue = read_catalogue(package, table)
        settings = BuildSettings(arguments.size, arguments.seed, arguments.quality, arguments.shard_samples)
        make_folder(arguments.out)
        splits = build_set(catalogue, world, arguments.out, settings)
    for name in splits:
        index_folder(arguments.out / name, tokenizer, provenance(catalogue, world, settings, name))
    return 0
