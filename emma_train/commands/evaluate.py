"""Score a model on the held-out splits of the emoji set."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.commands.model_arguments import add_model_arguments
from emma_train.errors import UserError, check_range

if TYPE_CHECKING:
    from emma_train.config.schema import Recipe
    from emma_train.generate.generator import Generator

SCORE_SPLITS = ("heldout_drawings", "heldout_concepts")
NUM_TRAINING_IMAGES = 600
"""Training images among which a generated image's nearest neighbour is looked for, beside the split's own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--benchmark", choices=("emoji",), default="emoji")
    parser.add_argument("--data", default="recipes/tiny/assets/emoji", help="folder with the held-out splits")
    parser.add_argument("--limit", type=int, default=96, help="images to draw per split; 0 draws all (%(default)s)")
    parser.add_argument("--out", help="where to write the scores (MODEL/scores.json)")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the scores and write them as JSON."""
    from emma_train.generate.load import load_generator
    from emma_train.storage.files import output_file, write_atomic
    from emma_train.storage.paths import as_local, parse_path

    if not arguments.out and as_local(parse_path(arguments.model)) is None:
        raise UserError(f"evaluate {arguments.model}: say where to write the scores (--out FILE)")
    check_range("--limit", arguments.limit, 0, 10**9)
    out = output_file("--out", Path(arguments.out or f"{arguments.model}/scores.json"))
    generator, recipe, meta = load_generator(
        arguments.model, arguments.device, not arguments.no_ema, arguments.precision
    )
    scores = _scores(generator, recipe, Path(arguments.data), arguments.limit)
    result = {"model": str(arguments.model), "stage": meta["stage"], "step": meta["step"], "scores": scores}
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    for score in scores:
        name, value, baseline = score["name"], score["value"], score["baseline"]
        print(f"{score['split']:18} {name:34} {value:8.3f}   (chance or baseline {baseline:.3f})")
    print(out)
    return 0


def _scores(generator: "Generator", recipe: "Recipe", data: Path, limit: int) -> list[dict[str, Any]]:
    """The scores of all held-out splits; `limit`: images to generate for a split (0: all)."""
    from data_pipelines.loader.requests import read_requests
    from emma_train.generate.scores import score_split
    from emma_train.sequence.tasks import RECORD_KEYS

    pixels, scores = recipe.model.autoencoder.pixels, []
    seen = read_requests(data / "train", "t2i", recipe.data, pixels, NUM_TRAINING_IMAGES)
    for split in SCORE_SPLITS:
        requests = {task: read_requests(data / split, task, recipe.data, pixels) for task in RECORD_KEYS}
        scores += score_split(generator, split, requests, seen, recipe, limit)
    return scores
