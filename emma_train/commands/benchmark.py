"""The images of a public benchmark: written, checked and scored (part of `evaluate`)."""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emma_train.commands.judge import judge_benchmark, judge_summary
from emma_train.commands.model_arguments import given_settings, wanted_size
from emma_train.commands.publish import check_publishing, publish
from emma_train.errors import UserError, check_range

if TYPE_CHECKING:
    from emma_train.config.schema import Recipe
    from emma_train.engine.world import World
    from emma_train.evaluate.benchmark import Benchmark, BenchmarkItem
    from emma_train.evaluate.writer import BenchmarkRun

log = logging.getLogger(__name__)
MAX_RANK_LAG_S = 30 * 24 * 3600
"""Ranks wait for each other at the end alone, and one may have hours more to do."""
MAX_FAILURES_SHOWN = 20


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Write the images that are missing in --out, or check them."""
    from emma_train.evaluate.layouts import read_benchmark

    if not arguments.data or not arguments.out:
        raise UserError(
            f"--benchmark {arguments.benchmark} needs --data, the folder of its official files, and --out, a folder "
            "for the images"
        )
    check_range("--batch", arguments.batch, 1, 65_536)
    benchmark, items = read_benchmark(arguments.benchmark, Path(arguments.data), arguments.language)
    if (arguments.card or arguments.wandb) and not (arguments.score or arguments.judge):
        raise UserError("--card and --wandb: images have no scores yet; give them together with --score or --judge")
    check_publishing(arguments)
    if sum(map(bool, (arguments.check, arguments.score, arguments.judge))) > 1:
        raise UserError("--check, --score and --judge: give one of them")
    if arguments.check or arguments.score or arguments.judge:
        settings = _begun(arguments, benchmark, items)
        if arguments.judge:
            arguments.score = judge_benchmark(arguments, benchmark, items[: arguments.limit or None])
        part = _check if arguments.check else _score
        return part(arguments, benchmark, items[: arguments.limit or None], settings)
    return _write(arguments, benchmark, items)


def _write(arguments: argparse.Namespace, benchmark: "Benchmark", items: "list[BenchmarkItem]") -> int:
    import torch

    from emma_train.engine.world import join
    from emma_train.evaluate.image_folder import ImageFolder
    from emma_train.evaluate.overview import write_overview
    from emma_train.evaluate.writer import write_images
    from emma_train.generate.load import load_generator

    limit = arguments.limit or 0
    wanted = items[: limit or None]
    with join(arguments.device, MAX_RANK_LAG_S) as world:
        if world.device.type == "cpu":
            torch.set_num_threads(1)  # sums are divided among threads, so that their number would change the images
        prompts = world.on_main(lambda: _shown_prompts(arguments, items))
        generator, recipe, meta = load_generator(
            arguments.model, arguments.device, not arguments.no_ema, arguments.precision, not arguments.no_experts
        )
        run = _benchmark_run(arguments, benchmark, items, prompts, recipe)
        folder = ImageFolder(Path(arguments.out), world.rank)
        world.on_main(lambda: _begin(arguments, run, meta, world))
        num_images = write_images(run, generator, folder, limit, world)
        if world.is_main:
            folder.clean()
            write_overview(benchmark, folder, wanted, run.prompts)
            print(f"{benchmark.name}: {num_images} images generated, all of {len(wanted)} items are in {folder.images}")
            if len(items) != benchmark.num_items and not arguments.language:
                log.warning("--data has %d items, the official set has %d", len(items), benchmark.num_items)
    return 0


def _shown_prompts(arguments: argparse.Namespace, items: "list[BenchmarkItem]") -> list[str]:
    """The prompts that the model is shown: the official ones, or rewritten ones. Raises UserError, RunError."""
    from emma_train.chat.options import ChatOptions, open_chat
    from emma_train.evaluate.rewrites import REWRITTEN_FILE, ask_for_rewrites, read_rewrites
    from emma_train.storage.files import make_folder

    if not arguments.rewrite:
        return [item.prompt for item in items]
    if not _is_endpoint(arguments):
        return read_rewrites([Path(path) for path in arguments.rewrite], items)
    out = Path(arguments.out)
    make_folder(out)
    written = out / REWRITTEN_FILE
    if not written.is_file():
        options = ChatOptions(arguments.rewrite[0], arguments.rewrite_model, cache=str(out / "rewrite-answers"))
        written = ask_for_rewrites(open_chat(options), items, out)
    return read_rewrites([written], items)


def _is_endpoint(arguments: argparse.Namespace) -> bool:
    return len(arguments.rewrite) == 1 and arguments.rewrite[0].startswith(("http://", "https://"))


def _describe_rewrite(arguments: argparse.Namespace, prompts: Sequence[str]) -> dict[str, Any] | None:
    """What results say of rewritten prompts."""
    from emma_train.evaluate.settings_file import texts_digest

    if not arguments.rewrite:
        return None
    by = [arguments.rewrite_model] if _is_endpoint(arguments) else [Path(path).name for path in arguments.rewrite]
    return {"by": by, "digest": texts_digest(prompts)}


def _benchmark_run(
    arguments: argparse.Namespace,
    benchmark: "Benchmark",
    items: "list[BenchmarkItem]",
    prompts: list[str],
    recipe: "Recipe",
) -> "BenchmarkRun":
    from data_pipelines.shards.images import load_resized
    from emma_train.evaluate.writer import BenchmarkRun
    from emma_train.generate.settings import read_settings, with_overrides
    from emma_train.sequence.geometry import image_size
    from emma_train.sequence.tasks import TASKS
    from emma_train.storage.paths import parse_path

    flow, _ = read_settings(parse_path(arguments.model), recipe)
    multiple, image_config = recipe.model.autoencoder.pixels, TASKS["it2i"].image_config(recipe.data)
    return BenchmarkRun(
        benchmark,
        items,
        prompts,
        with_overrides(flow, given_settings(arguments, flow), "--"),
        wanted_size(arguments.size, [], recipe.data.gen.side, multiple),
        lambda width, height: image_size(width, height, image_config, multiple),
        lambda encoded: load_resized(encoded, image_config, multiple),
        arguments.batch,
    )


def _begin(arguments: argparse.Namespace, run: "BenchmarkRun", meta: dict[str, Any], world: "World") -> None:
    """Write settings.json, or check that it is what this run would write. Raises UserError."""
    from emma_train.evaluate.settings_file import checkpoint_digest, prompts_digest, require_same_settings
    from emma_train.generate.load import weight_type
    from emma_train.storage.files import make_folder
    from emma_train.training.environment import code_versions

    fixed = {
        "benchmark": run.benchmark.name,
        "checkpoint": {"stage": meta["stage"], "step": meta["step"], "digest": checkpoint_digest(meta)},
        "ema": not arguments.no_ema,
        "experts": not arguments.no_experts,
        "prompts": prompts_digest(run.items),
        "rewrite": _describe_rewrite(arguments, run.prompts),
        "generation": asdict(run.flow),
        "size": list(run.size),
        "batch": run.batch,
        "device": world.device.type,
        "dtype": str(weight_type(arguments.precision, world.device)).removeprefix("torch."),
    }
    make_folder(Path(arguments.out))
    require_same_settings(
        Path(arguments.out), fixed, {"model": str(arguments.model), "date": time.time(), **code_versions()}
    )


def _begun(arguments: argparse.Namespace, benchmark: "Benchmark", items: "list[BenchmarkItem]") -> dict[str, Any]:
    """The settings of --out, which was begun with these items. Raises UserError."""
    from emma_train.evaluate.settings_file import first_change, prompts_digest, read_benchmark_settings

    settings = read_benchmark_settings(Path(arguments.out))
    asked = {"benchmark": benchmark.name, "prompts": prompts_digest(items)}
    if change := first_change({key: settings["fixed"].get(key) for key in asked}, asked):
        raise UserError(f"--out {arguments.out}: {change}; name the files with which it was begun")
    return settings


def _check(
    arguments: argparse.Namespace, benchmark: "Benchmark", items: "list[BenchmarkItem]", settings: dict[str, Any]
) -> int:
    """Print what is wrong with the images. Exit code 1 where something is."""
    from emma_train.evaluate.check_images import ImageCheck
    from emma_train.evaluate.image_folder import ImageFolder
    from emma_train.evaluate.settings_file import describe_checkpoint

    height, width = settings["fixed"]["size"]
    checked = ImageCheck(benchmark, ImageFolder(Path(arguments.out)), (height, width))
    counts = Counter[str]()
    for problem in checked.problems(items):
        counts[problem.kind] += 1
        print(problem)
    if counts:
        summary = ", ".join(f"{num} {kind}" for kind, num in counts.items())
        print(f"{arguments.out}: {summary}; remove what is extra or wrong, write what is missing, then check again")
        return 1
    made_by = describe_checkpoint(settings["fixed"])
    print(f"{arguments.out}: the images of {len(items)} items are complete ({made_by})")
    return 0


def _score(
    arguments: argparse.Namespace, benchmark: "Benchmark", items: "list[BenchmarkItem]", settings: dict[str, Any]
) -> int:
    """Print the official statistics, and write them as results.json, a table and samples.jsonl."""
    from emma_train.evaluate.settings_file import describe_checkpoint
    from emma_train.evaluate.write_scores import write_scores

    scores = benchmark.score(items, [Path(path) for path in arguments.score], Path(arguments.data))
    judge = judge_summary(Path(arguments.out)) if arguments.judge else None
    write_scores(Path(arguments.out), scores, items, settings, arguments.score, judge)
    for row in scores.rows:
        print(f"{row['name']:40} {row['value']:9.4f} ± {row['stderr']:.4f}   (n {row['num']}, {row['unit']})")
    for note in [*scores.notes, *scores.failures[:MAX_FAILURES_SHOWN]]:
        log.warning("%s", note)
    if scores.failures:
        log.warning("%d answers are missing or cannot be read: each counts as the lowest score", len(scores.failures))
    print(f"{arguments.out}/results.json ({describe_checkpoint(settings['fixed'])})")
    publish(arguments, scores.rows, {**settings["fixed"], "limit": arguments.limit}, Path(arguments.out))
    return 0
