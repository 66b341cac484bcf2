"""Score a model on the held-out splits of the emoji set, or write and score the images of a public benchmark."""

import argparse
import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.commands.judge import add_judge_arguments
from emma_train.commands.model_arguments import add_flow_arguments, add_model_arguments, given_settings
from emma_train.commands.publish import check_publishing, publish
from emma_train.errors import RunError, UserError, check_range

if TYPE_CHECKING:
    from data_pipelines.emoji.exact import ImageJudge, Judgement
    from emma_train.config.schema import Recipe
    from emma_train.generate.generator import Generator
    from emma_train.generate.items import EvaluationItem
    from emma_train.generate.settings import FlowSettings
    from emma_train.sequence.request import Request

log = logging.getLogger(__name__)

EMOJI_DATA, EMOJI_LIMIT = "recipes/tiny/assets/emoji", 96
SCORE_SPLITS = ("heldout_drawings", "heldout_concepts")
NUM_TRAINING_IMAGES = 600
"""Training images among which a generated image's nearest neighbour is looked for, beside the split's own."""
NUM_STEM_QUESTIONS = 400
"""Questions about formulas and charts that are drawn for the evaluation; a split alone has too few."""
STEM_SIDE, STEM_QUALITY = 128, 70
"""As the tiny data set stores its images."""

MOST_EDIT_STEPS = 3
"""More cannot always be made: each changes something else."""

Scores = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from emma_train.evaluate.layouts import BENCHMARKS

    add_model_arguments(parser)
    parser.add_argument("--benchmark", choices=("emoji", *BENCHMARKS), default="emoji", help="(%(default)s)")
    parser.add_argument("--data", help=f"folder with the held-out splits ({EMOJI_DATA}) or the benchmark's files")
    parser.add_argument(
        "--limit", type=int, help=f"emoji: images per split and task ({EMOJI_LIMIT}); else: the first items; 0: all"
    )
    parser.add_argument(
        "--card", action="store_true", help="put the scores into the model card (README.md) of an export"
    )
    parser.add_argument("--wandb", action="store_true", help="send the scores to the W&B run that trained the model")
    parser.add_argument(
        "--answer-tokens", type=int, default=12, help="emoji: tokens of an answer at most (%(default)s)"
    )
    parser.add_argument(
        "--edit-steps", type=int, default=1, help="emoji: edits one after another, each judged, at most (%(default)s)"
    )
    parser.add_argument("--out", help="emoji: file for the scores (MODEL/scores.json); else: folder for the images")
    parser.add_argument(
        "--compare", metavar="FILE", help="emoji: earlier scores of this model; exit code 1 where the new ones differ"
    )
    images = parser.add_argument_group("of a benchmark's images")
    images.add_argument("--check", action="store_true", help="only look for what is missing or wrong in --out")
    images.add_argument("--score", nargs="+", metavar="FILE", help="official statistics of what its scorer wrote")
    images.add_argument(
        "--rewrite",
        nargs="+",
        metavar="FILE|URL",
        help="prompts to show instead: files, or a chat model's URL up to /v1",
    )
    images.add_argument("--rewrite-model", default="", metavar="NAME", help="the chat model's name at that URL")
    images.add_argument(
        "--language", choices=("en", "cn"), default="", help="of gedit's instructions (both), or emoji's (en)"
    )
    images.add_argument("--batch", type=int, default=16, help="images at once (%(default)s)")
    images.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of an image in pixels")
    add_judge_arguments(parser.add_argument_group("of a chat model that judges a benchmark's images"))
    add_flow_arguments(parser.add_argument_group("how to generate", "not given: as the export or recipe says"))


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the scores and write them as JSON, with all items beside them."""
    if arguments.limit is not None:
        check_range("--limit", arguments.limit, 0, 10**9)
    check_range("--answer-tokens", arguments.answer_tokens, 1, 1024)
    check_range("--edit-steps", arguments.edit_steps, 1, MOST_EDIT_STEPS)
    if arguments.benchmark == "emoji":
        return _run_emoji(arguments)
    if arguments.compare:
        raise UserError(f"--compare is for the emoji world's scores, not for {arguments.benchmark}")
    from emma_train.commands.benchmark import run_benchmark

    return run_benchmark(arguments)


def _run_emoji(arguments: argparse.Namespace) -> int:
    from emma_train.evaluate.compare_scores import compare_scores, describe_differences, read_scores_file
    from emma_train.generate.load import load_generator
    from emma_train.generate.results import write_results
    from emma_train.generate.settings import FlowSettings, with_overrides
    from emma_train.storage.files import output_file, write_atomic
    from emma_train.storage.paths import as_local, parse_path

    if arguments.check or arguments.score or arguments.judge or arguments.rewrite:
        options = "--check, --score, --judge and --rewrite"
        raise UserError(f"{options} are for the images of a benchmark; name one with --benchmark")
    if not arguments.out and as_local(parse_path(arguments.model)) is None:
        raise UserError(f"evaluate {arguments.model}: say where to write the scores (--out FILE)")
    out = output_file("--out", Path(arguments.out or f"{arguments.model}/scores.json"))
    earlier = read_scores_file(Path(arguments.compare)) if arguments.compare else None
    data, limit = Path(arguments.data or EMOJI_DATA), EMOJI_LIMIT if arguments.limit is None else arguments.limit
    if arguments.language == "cn" and arguments.edit_steps > 1:
        raise UserError("--language cn has single edits alone; leave out --edit-steps")
    check_publishing(arguments)
    generator, recipe, meta = load_generator(
        arguments.model, arguments.device, not arguments.no_ema, arguments.precision, not arguments.no_experts
    )
    flow = FlowSettings.of(recipe)
    settings = with_overrides(flow, given_settings(arguments, flow), "--")
    scores, items = _evaluate(generator, recipe, data, limit, settings, arguments)
    about = _about(arguments, meta, settings, data, limit)
    write_results(_details_folder(out), scores, items, about)
    result = {"model": str(arguments.model), "stage": meta["stage"], "step": meta["step"], "scores": scores}
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    for score in scores:
        value = f"{score['value']:8.3f} ± {score['stderr']:.3f}"
        note = f"(n {score['num']}, chance or baseline {score['baseline']:.3f})"
        print(f"{score['split']:18} {score['name']:34} {value}   {note}")
    print(out)
    publish(arguments, scores, about["config"], out.parent, items)
    if earlier is not None:
        line, wrong = compare_scores(scores, earlier)
        print(line)
        if wrong:
            raise RunError(describe_differences(wrong, Path(arguments.compare)))
    return 0


def _details_folder(out: Path) -> Path:
    """scores.json -> scores; a file without a suffix gets one of another name."""
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-details")


def _about(
    arguments: argparse.Namespace, meta: dict[str, Any], settings: "FlowSettings", data: Path, limit: int
) -> dict[str, Any]:
    """What was evaluated, how and with which code, as results.json says it."""
    from emma_train.evaluate.settings_file import checkpoint_digest
    from emma_train.training.environment import code_versions

    config = {
        "model": "emma",
        "model_args": str(arguments.model),
        "stage": meta["stage"],
        "step": meta["step"],
        "checkpoint_digest": checkpoint_digest(meta),
        "ema": not arguments.no_ema,
        "experts": not arguments.no_experts,
        "device": arguments.device,
        "dtype": arguments.precision,
        "limit": limit or None,
        "language": arguments.language or "en",
        "answer_tokens": arguments.answer_tokens,
        "edit_steps": arguments.edit_steps,
        "data": str(data),
        "gen_kwargs": asdict(settings),
    }
    return {"config": config, "model_name": str(arguments.model), "date": time.time(), **code_versions()}


def _evaluate(
    generator: "Generator",
    recipe: "Recipe",
    data: Path,
    limit: int,
    settings: "FlowSettings",
    arguments: argparse.Namespace,
) -> tuple[Scores, list["EvaluationItem"]]:
    """Scores and items of all held-out splits; `limit`: images to generate for a split and task (0: all)."""
    from data_pipelines.loader.requests import read_requests
    from emma_train.commands.edit_chains import judged_chains
    from emma_train.generate import scores as measures
    from emma_train.generate.items import share_scores
    from emma_train.sequence.tasks import tasks_of_loss

    pixels, judge = recipe.model.autoencoder.pixels, _image_judge(data)
    scores: Scores = []
    items: list[EvaluationItem] = []
    seen = read_requests(data / "train", "t2i", recipe.data, pixels, NUM_TRAINING_IMAGES)
    for split in SCORE_SPLITS:
        requests = _requests(recipe, data / split, judge, arguments.language)
        answers = measures.answer_items(generator, split, requests["i2t"], arguments.answer_tokens)
        scores += share_scores(answers, "exact match", "answer")
        for task in tasks_of_loss("flow"):
            if requests.get(task):
                scores.append(measures.velocity_score(generator, split, requests[task], recipe.flow, task))
        prompts = requests["t2i"][: limit or None]
        latents = measures.generated_latents(generator, prompts, settings)
        real = [*seen, *requests["t2i"]]
        scores += measures.neighbour_scores(generator, split, prompts, latents, real)
        images = _judged_images(generator, judge, split, requests, limit, settings, latents) if judge else []
        edits = [item for item in images if item.task == "it2i"]
        scores += share_scores([item for item in images if item.task == "t2i"], "share of images", "image")
        scores += share_scores(edits, "share of edits", "edit")
        scores += share_scores([replace(item, kind="any") for item in edits], "share of edits", "edit")
        chains: list[EvaluationItem] = []
        if judge and arguments.edit_steps > 1:
            edits_asked = requests.get("it2i", [])[: limit or None]
            judged = judged_chains(generator, judge, split, edits_asked, arguments.edit_steps, settings)
            chains = [_item(split, judgement) for judgement in judged]
            scores += share_scores(chains, "share of edits", "edits")
        items += [*answers, *images, *chains]
    if judge:
        questions = _stem_requests(recipe, data / "train")
        stems = measures.answer_items(generator, "heldout_stem", questions, arguments.answer_tokens)
        scores += share_scores(stems, "exact match", "answer")
        scores += share_scores([replace(item, kind="stem") for item in stems], "exact match", "answer")
        items += stems
    return [measures.with_bar(score) for score in scores], items


def _requests(recipe: "Recipe", folder: Path, judge: "ImageJudge | None", language: str) -> dict[str, list["Request"]]:
    """Questions, prompts and edits of a split by task; prompts and edits in the language. Raises UserError."""
    from data_pipelines.loader.requests import read_requests
    from emma_train.sequence.tasks import RECORD_KEYS

    pixels = recipe.model.autoencoder.pixels
    requests = {task: read_requests(folder, task, recipe.data, pixels) for task in RECORD_KEYS}
    if language != "cn":
        return requests
    if judge is None:
        raise UserError("--language cn needs what the exact scores need, and they are left out; see the warning before")
    return requests | {task: judge.in_chinese(requests[task]) for task in ("t2i", "it2i") if task in requests}


def _image_judge(data: Path) -> "ImageJudge | None":
    """None, with a warning, where the packages that draw scenes are not installed, or the data set has no sheet of its
    drawings."""
    try:
        from data_pipelines.emoji.drawing_sheet import read_sheet
        from data_pipelines.emoji.exact import ImageJudge
    except ModuleNotFoundError as error:
        log.warning("exact scores are left out: they need %s; pip install 'emma-train[data]'", error.name)
        return None
    try:
        return ImageJudge(read_sheet(data))
    except UserError as error:
        log.warning("exact scores are left out: %s", error)
        return None


def _judged_images(
    generator: "Generator",
    judge: "ImageJudge",
    split: str,
    requests: dict[str, list["Request"]],
    limit: int,
    settings: "FlowSettings",
    latents: list[Any],
) -> list["EvaluationItem"]:
    """The images of prompts (`latents`) and of edits, judged."""
    from emma_train.generate.scores import decoded_images, generated_latents

    prompts, edits = requests["t2i"][: limit or None], requests.get("it2i", [])[: limit or None]
    judged = judge.prompts(prompts, decoded_images(generator, prompts, latents))
    changed = decoded_images(generator, edits, generated_latents(generator, edits, settings)) if edits else []
    return [_item(split, judgement) for judgement in [*judged, *judge.edits(edits, changed)]]


def _item(split: str, judgement: "Judgement") -> "EvaluationItem":
    from emma_train.generate.items import EvaluationItem

    request = judgement.request
    asked = (request.task, judgement.kind, request.key, request.text, request.seed)
    item = EvaluationItem(split, *asked, judgement.verdicts)
    item.output, item.image, item.baseline = judgement.reading, judgement.image, judgement.baseline
    return item


def _stem_requests(recipe: "Recipe", train: Path) -> list["Request"]:
    """Questions about formulas and charts that the training set `train` does not show, drawn now."""
    from data_pipelines.emoji.build import unseen_stems
    from data_pipelines.emoji.stem import render_stem
    from data_pipelines.shards.images import load_resized
    from data_pipelines.shards.index import read_manifest
    from data_pipelines.shards.write import webp
    from emma_train.sequence.request import Request

    manifest, requests = read_manifest(train), []
    num_train = sum(shard["tags"]["i2t"].get("stem", 0) for shard in manifest["shards"])
    for number, stem in enumerate(unseen_stems(NUM_STEM_QUESTIONS, num_train, manifest["provenance"]["seed"])):
        encoded = webp(render_stem(stem, STEM_SIDE), STEM_QUALITY)
        image = load_resized(encoded, recipe.data.und, recipe.model.autoencoder.pixels)
        for index, (question, answer) in enumerate(stem.questions):
            key = f"stem-{number:06d}/{index}"
            requests.append(Request(key, "i2t", question, [image], truth=answer, kind=stem.labels["stem"]))
    return requests
