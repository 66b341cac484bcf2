"""Choose rows of shards by their index and columns: a list, not a copy; a recipe's source may be one."""

import argparse
import os
import sys
from pathlib import Path

from data_pipelines.commands.common_arguments import shard_folders, tokenizer_file
from emma_train.errors import UserError, check_range


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the selection")
    parser.add_argument(
        "--from", dest="sources", nargs="+", type=Path, required=True, metavar="SHARDS", help="folders of shards"
    )
    parser.add_argument("--task", action="append", default=[], choices=("i2t", "t2i", "it2i"), help="only rows of it")
    parser.add_argument(
        "--where", action="append", default=[], metavar="SQL", help="a condition, such as 'size.min_side >= 1024'"
    )
    parser.add_argument("--per", default="", metavar="SQL", help="at most --top rows of each value of it")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="number of rows; of each value of --per")
    parser.add_argument("--balance", default="", metavar="SQL", help="as many rows of each value as of the rarest")
    parser.add_argument(
        "--spread", default="", metavar="SQL", help="take from each value in turn; aspect_bucket() is known"
    )
    parser.add_argument("--best", default="", metavar="SQL", help="highest first; by a hash of seed and key without it")
    parser.add_argument("--tag", default="", metavar="SQL", help="a further tag of selected rows, such as stem.label")
    parser.add_argument(
        "--captions", default="", metavar="SQL", help="further captions of records with one image: caption.caption"
    )
    parser.add_argument("--tokenizer", type=Path, help="of the index; counts the tokens of --captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-gib", type=float, default=4.0, help="of DuckDB (%(default)s); more goes to disk")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of DuckDB (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from data_pipelines.prepare.select_rows import EngineLimits, read_sources, select_rows
    from data_pipelines.prepare.selection_rules import SelectionRules, expand_macros
    from emma_train.sequence.tokens import TextTokenizer

    check_range("--top", arguments.top, 0, 10**12)
    check_range("--seed", arguments.seed, 0, 2**63)
    check_range("--threads", arguments.threads, 1, 4096)
    if not 0.1 <= arguments.memory_gib <= 1e6:
        raise UserError(f"--memory-gib {arguments.memory_gib}: must be from 0.1 to 1,000,000")
    per, balance, spread, best, tag = expand_macros(
        [arguments.per, arguments.balance, arguments.spread, arguments.best, arguments.tag]
    )
    where = tuple(expand_macros(arguments.where))
    rules = SelectionRules(
        tuple(arguments.task), where, per, arguments.top, balance, spread, best, tag, arguments.captions, arguments.seed
    )
    sources = read_sources([folder for path in arguments.sources for folder in shard_folders(path)])
    limits = EngineLimits(arguments.memory_gib, arguments.threads)
    tokenizer = TextTokenizer(tokenizer_file(arguments.tokenizer)) if arguments.tokenizer else None
    manifest = select_rows(arguments.out, sources, rules, limits, tokenizer)
    for name, number in manifest["provenance"]["rows_left"].items():
        sys.stdout.write(f"{number:>14,}  {name}\n")
    return 0
