"""Marks of a chat model for the images of a benchmark (part of `evaluate`)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem

JUDGE_FOLDER = "judge"
"""In the folder of the images."""
JUDGE_TOKENS = 1400
"""As the official clients allow."""


def add_judge_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--judge", metavar="NAME", help="let this chat model judge the images of gedit, imgedit or wise, then --score"
    )
    group.add_argument("--judge-endpoint", default="", metavar="URL", help="of the judge, up to /v1; else a folder")
    group.add_argument("--judge-parallel", type=int, default=8, metavar="N", help="requests at once (%(default)s)")


def judge_benchmark(
    arguments: argparse.Namespace, benchmark: "Benchmark", items: "Sequence[BenchmarkItem]"
) -> list[str]:
    """Ask the judge about every image, and return the files that --score takes. Raises UserError, RunError."""
    from emma_train.chat.options import ChatOptions, open_chat
    from emma_train.evaluate.image_folder import ImageFolder
    from emma_train.evaluate.judge import judge_images, write_judgement
    from emma_train.evaluate.judge_forms import judge_form
    from emma_train.storage.files import make_folder

    if (form := judge_form(benchmark.name, Path(arguments.data))) is None:
        raise UserError(f"--judge: no chat model judges {benchmark.name}; run its official scorer (docs/evaluation.md)")
    out = Path(arguments.out) / JUDGE_FOLDER
    make_folder(out)
    options = ChatOptions(
        endpoint=arguments.judge_endpoint,
        model=arguments.judge,
        max_tokens=JUDGE_TOKENS,
        parallel=arguments.judge_parallel,
        cache=str(out / "answers"),
    )
    chat = open_chat(options)
    judgement = judge_images(benchmark, items, ImageFolder(Path(arguments.out)), form, chat)
    return [str(path) for path in write_judgement(out, items, form, judgement, chat)]


def judge_summary(out: Path) -> dict[str, Any]:
    """What results.json says of the judge: its identity, and its answers by what became of them."""
    from emma_train.evaluate.judge import REPORT_FILE
    from emma_train.storage.safetensors_io import read_json

    report = read_json(out / JUDGE_FOLDER / REPORT_FILE)
    return {**report["judge"], "answers": report["answers"]}
