"""emma-train: the only place that joins the parts. A command is a function here; the work is done in the rooms."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emma_train.errors import RankFailure, RunError, UserError

if TYPE_CHECKING:
    from emma_train.config.schema import Recipe
    from emma_train.engine.world import World
    from emma_train.training.preemption import StopRequest
    from emma_train.training.run_folder import RunFolder

log = logging.getLogger("emma_train")
SCORE_SPLITS = ("heldout_drawings", "heldout_concepts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failed, 2 bad usage or config, 75 stopped by a signal after a
    checkpoint."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    takes_overrides = arguments.command in ("train", "import", "plan", "launch")
    wrong = [word for word in overrides if not takes_overrides or word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(
            f"{arguments.command}: did not understand {wrong[0]!r}" + "; overrides are key=value" * takes_overrides
        )
    _set_up_logging()
    try:
        run: Callable[[argparse.Namespace, list[str]], int] = arguments.run
        return run(arguments, overrides)
    except UserError as error:
        # Every rank says it: what only one of them met would be lost otherwise.
        print(f"emma-train {arguments.command}: {error}", file=sys.stderr, flush=True)
        return 2
    except RunError as error:
        print(f"emma-train {arguments.command}: {error}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        return 1
    except RankFailure as error:
        if str(error):
            print(f"emma-train {arguments.command}: {error}", file=sys.stderr, flush=True)
        return 1


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train a stage or a pipeline; resumes where its run folder has a checkpoint."""
    from emma_train.config.load import is_pipeline, load_recipe
    from emma_train.engine.world import join, share_packs
    from emma_train.stages.stage import stage_of
    from emma_train.training.preemption import EXIT_PREEMPTED, StopRequest

    path = Path(arguments.recipe)
    recipes = _pipeline_recipes(path, overrides) if is_pipeline(path) else [(path, load_recipe(path, overrides))]
    for file, recipe in recipes:
        stage_of(recipe, str(file))
    first = recipes[0][1].engine
    # One group of processes for all stages: gloo cannot be left and joined again within a process.
    traces = Path(recipes[0][1].run.root) / recipes[0][1].run.name / "logs" / "nccl-rank-"
    with join(first.device, first.timeout_s, traces) as world, StopRequest() as stop:
        if not world.is_main:
            logging.getLogger().setLevel(logging.ERROR)
        for file, recipe in recipes:
            if world.sum([float(stop.asked)])[0]:
                return EXIT_PREEMPTED
            if code := _train_stage(file, recipe, share_packs(world, recipe.engine.sequence_parallel), stop):
                return code
        if world.is_main and len(recipes) > 1:
            _try_report(Path(recipes[-1][1].run.root))
    return 0


def _pipeline_recipes(path: Path, overrides: list[str]) -> "list[tuple[Path, Recipe]]":
    """The stages' recipes, each told to start from the one before and to live in the pipeline's run folder."""
    from emma_train.config.load import load_pipeline, load_recipe

    pipeline, for_stages = load_pipeline(path, overrides)
    root = Path(pipeline.run.root) / pipeline.run.name
    recipes: list[tuple[Path, Recipe]] = []
    previous = ""
    for name in pipeline.pipeline:
        file = path.parent / name
        own = [f"run.root={root}", f"run.name={file.stem}", *([f"init.from={previous}"] if previous else [])]
        recipe = load_recipe(file, [*for_stages, *own])
        previous = str(root / file.stem)
        if recipe.train.checkpoints:
            recipe.train.checkpoints = f"{recipe.train.checkpoints.rstrip('/')}/{pipeline.run.name}"
            previous = f"{recipe.train.checkpoints}/{file.stem}"
        recipes.append((file, recipe))
    return recipes


def _train_stage(path: Path, recipe: "Recipe", world: "World", stop: "StopRequest") -> int:
    """Train one stage, as far as it is not complete, alone in its run folder."""
    from emma_train.checkpoint import folder as folders
    from emma_train.training.run_folder import RunFolder
    from emma_train.training.run_lock import RunLock

    run = RunFolder(recipe)
    run.check_checkpoints(world)
    newest = world.on_main(lambda: folders.newest(run.checkpoints))
    if newest is not None and (folders.read_meta(newest) or {})["step"] >= recipe.train.steps:
        log.info("%s is complete: nothing to do", run.path)
        return 0
    with ExitStack() as held:

        def lock() -> None:
            held.enter_context(RunLock(run.path))

        world.on_main(lock)
        return _train_in(run, path, recipe, world, stop)


def _train_in(run: "RunFolder", path: Path, recipe: "Recipe", world: "World", stop: "StopRequest") -> int:
    """Join stream, model, engine and loop for one stage."""
    from data_pipelines.loader.loader import Stream, dead_worker
    from data_pipelines.loader.requests import read_requests
    from emma_train.checkpoint import verify
    from emma_train.config.mix import phases
    from emma_train.generate.generator import Generator
    from emma_train.generate.samples import write_samples
    from emma_train.generate.settings import FlowSettings, TextSettings
    from emma_train.model.autoencoder import Autoencoder
    from emma_train.sequence.tokens import TextTokenizer
    from emma_train.stages.stage import stage_of
    from emma_train.training.build import build
    from emma_train.training.loop import Trainer

    stage = stage_of(recipe, str(path))
    checkpoint = verify.to_resume(run.checkpoints, world)
    autoencoder = Autoencoder(recipe.model.autoencoder, world.device)
    stream = Stream(recipe, world.dp_rank, world.dp_size, autoencoder.fingerprint, pin=world.device.type == "cuda")
    if checkpoint is None:
        world.on_main(run.check_new)
        stream.planner.check()
    requests = []
    if recipe.train.sample_from and stage.loss == "tokens":
        folder, pixels = recipe.train.sample_from, recipe.model.autoencoder.pixels
        mixed = [task for task in stage.tasks if any(getattr(phase.mix, task) for phase in phases(recipe))]
        for task in mixed:
            requests += read_requests(folder, task, recipe.data, pixels, recipe.train.num_samples)
    built = build(recipe, stage, world, resuming=checkpoint is not None)
    if built.handoff is not None:
        log.info("from %s: %s", recipe.init.source, "; ".join(built.handoff.lines()))
    vision, tokenizer = recipe.model.vision, TextTokenizer(recipe.data.tokenizer)
    generator = Generator(built.engine.model, autoencoder, tokenizer, vision.patch, vision.shuffle)

    def generate_samples(step: int) -> list[Path]:
        flow, text = FlowSettings(shift=recipe.flow.shift), TextSettings(max_tokens=8, fixed_length=True)
        return write_samples(generator, requests, run.samples(step), flow, text, write=world.is_main)

    trainer = Trainer(recipe, stage, world, built, autoencoder, stream, generate_samples if requests else None)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    world.on_main(lambda: run.prepare(recipe, world))
    try:
        code = trainer.train(stop)
    except (RuntimeError, ConnectionError) as error:  # torch raises it wherever the trainer is when a worker dies
        raise dead_worker(error) from None
    built.engine.close()
    if world.is_main and code == 0:
        _try_report(run.path)
    return code


def inspect(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Say what a checkpoint is, whether it is whole to the byte, or copy it so that it stands alone."""
    from rich.console import Console
    from rich.table import Table

    from emma_train.checkpoint import folder as folders
    from emma_train.checkpoint.inspect import faults, flatten, rows
    from emma_train.storage import paths as places

    path = places.of(arguments.checkpoint)
    if arguments.self_contained:
        print(flatten(path, places.of(arguments.self_contained)))
        return 0
    if arguments.verify:
        found = faults(path)
        for folder, problem in found.items():
            print(f"{folder}: {problem or 'whole'}")
        return 1 if any(found.values()) else 0
    checkpoint = folders.resolve(path, "CHECKPOINT")
    meta = folders.read_meta(checkpoint)
    assert meta is not None
    if arguments.json:
        print(json.dumps({k: v for k, v in meta.items() if k != "files"}, indent=1))
        return 0
    table = Table(title=str(checkpoint), show_header=False)
    for name, value in rows(checkpoint, meta).items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def import_(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write an initial export from public Qwen3, SigLIP2 and DC-AE folders, for init.from of the first stage."""
    from emma_train.export.import_hf import import_pretrained

    llm, vision, autoencoder = (Path(arguments.llm), Path(arguments.vision), Path(arguments.autoencoder))
    tokenizer = Path(arguments.tokenizer or arguments.llm)
    print(import_pretrained(Path(arguments.out), llm, vision, autoencoder, tokenizer, overrides))
    return 0


def export(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write a checkpoint as safetensors, config and tokenizer, loadable without torch.distributed."""
    from emma_train.export import export as exports
    from emma_train.export.qwen3 import write_qwen3
    from emma_train.export.stored_model import StoredModel
    from emma_train.generate.settings import read_settings, write_settings
    from emma_train.sequence.tokens import TextTokenizer
    from emma_train.storage import paths as places

    model, out = StoredModel(arguments.checkpoint, use_ema=not arguments.no_ema), Path(arguments.out)
    settings = read_settings(places.of(arguments.checkpoint), model.recipe)
    if arguments.format == "qwen3":
        write_qwen3(out, model)
    else:
        tokenizer = TextTokenizer(model.recipe.data.tokenizer).path
        exports.write(out, model.specs, model.read, model.recipe, model.meta, tokenizer)
        write_settings(out, *settings)
    print(out)
    return 0


def generate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Answer a question about images, or make or edit an image."""
    from PIL import Image

    from data_pipelines.shards.images import load_image
    from emma_train.generate.load import load_generator
    from emma_train.generate.settings import changed, read_settings
    from emma_train.sequence.geometry import image_size
    from emma_train.sequence.request import Request
    from emma_train.sequence.seeds import seed_of
    from emma_train.storage import paths as places

    if arguments.task != "t2i" and not arguments.image:
        raise UserError(f"--task {arguments.task} needs an image: --image FILE")
    if arguments.task == "t2i" and arguments.image:
        raise UserError("--task t2i takes no --image; --task it2i edits an image")
    generator, recipe, _ = load_generator(arguments.model, arguments.device, not arguments.no_ema)
    flow, text = read_settings(places.of(arguments.model), recipe)
    flow = changed(flow, _given(arguments, flow), "--")
    text = changed(text, _given(arguments, text), "--")
    image_config, pixels = (
        (recipe.data.und if arguments.task == "i2t" else recipe.data.gen),
        recipe.model.autoencoder.pixels,
    )
    images = []
    for file in arguments.image:
        try:
            with Image.open(file) as image:
                images.append(load_image(image, *image_size(*image.size, image_config, pixels)).copy())
        except OSError as error:
            raise UserError(f"--image {file}: cannot be read ({error})") from None
    if arguments.size:
        width, height = arguments.size
        if width % pixels or height % pixels or min(width, height) <= 0:
            raise UserError(f"--size {width} {height}: both must be multiples of {pixels}")
    elif images:
        height, width = images[0].shape[:2]
    else:
        width = height = recipe.data.gen.side
    requests = [
        Request(f"{n}", arguments.task, prompt, images, (height, width), seed_of(arguments.seed, 0, str(n), "generate"))
        for prompt in arguments.prompt
        for n in range(arguments.num)
    ]
    if arguments.task == "i2t":
        for answer in generator.generate_text(requests, text):
            print(answer)
        return 0
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(requests), arguments.batch):
        for number, made in enumerate(
            generator.generate_images(requests[start : start + arguments.batch], flow), start
        ):
            path = out / f"{arguments.task}-{number:04d}.png"
            Image.fromarray(np.asarray(made)).save(path)
            print(path)
    return 0


def _given(arguments: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The options among a settings object's fields that were given."""
    return {k: v for k in vars(settings) if (v := getattr(arguments, k, None)) is not None}


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Score a model on the held-out splits of the emoji set."""
    from data_pipelines.loader.requests import read_requests
    from emma_train.generate.load import load_generator
    from emma_train.generate.scores import score_split
    from emma_train.storage import paths as places

    if not arguments.out and not isinstance(places.of(arguments.model), Path):
        raise UserError(f"evaluate {arguments.model}: say where to write the scores (--out FILE)")
    out = Path(arguments.out or f"{arguments.model}/scores.json")
    generator, recipe, meta = load_generator(arguments.model, arguments.device, not arguments.no_ema)
    folder, pixels = Path(arguments.data), recipe.model.autoencoder.pixels
    scores = []
    seen = read_requests(folder / "train", "t2i", recipe.data, pixels, 600)
    for split in SCORE_SPLITS:
        requests = {task: read_requests(folder / split, task, recipe.data, pixels) for task in ("i2t", "t2i", "it2i")}
        scores += score_split(generator, split, requests, seen, recipe, arguments.limit)
    result = {"model": str(arguments.model), "stage": meta["stage"], "step": meta["step"], "scores": scores}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for score in scores:
        print(
            f"{score['split']:18} {score['name']:34} {score['value']:8.3f}   (chance or baseline "
            f"{score['baseline']:.3f})"
        )
    print(out)
    return 0


def _try_report(run: Path) -> None:
    """Write the report of a run that has ended well; what is trained is worth more than its report."""
    from emma_train.report.report import write_report

    try:
        log.info("report: %s", write_report(run))
    except Exception as error:
        log.warning("no report of %s: %s", run, error)


def report(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write one self-contained HTML page about a run."""
    from emma_train.report.report import write_report

    print(write_report(Path(arguments.run_folder)))
    return 0


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Memory, throughput and batch arithmetic of a recipe, without a GPU."""
    from emma_train.config.load import is_pipeline, load_recipe
    from emma_train.plan import print_plan

    path = Path(arguments.recipe)
    recipes = _pipeline_recipes(path, overrides) if is_pipeline(path) else [(path, load_recipe(path, overrides))]
    return max(print_plan(recipe, str(file), arguments.gpus, arguments.gpu) for file, recipe in recipes)


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """What this machine can run, and what to install for the rest."""
    from emma_train.doctor import doctor as check_machine

    return check_machine()


def launch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Start or submit a run; prints the exact command or script."""
    from emma_train.config.load import is_pipeline, load_pipeline, load_recipe
    from launchers import LaunchOptions
    from launchers import launch as start

    path = Path(arguments.recipe)
    run = (load_pipeline(path, overrides)[0] if is_pipeline(path) else load_recipe(path, overrides)).run
    return start(str(path), overrides, LaunchOptions.from_arguments(arguments), Path(run.root) / run.name / "logs")


def _parser() -> argparse.ArgumentParser:
    from launchers import add_launch_arguments

    parser = argparse.ArgumentParser(prog="emma-train", description="Train EMMA: understand, make and edit images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace, list[str]], int]) -> argparse.ArgumentParser:
        name = run.__name__.removesuffix("_")  # `import` cannot be a function's name
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    def add_model(command: argparse.ArgumentParser) -> None:
        command.add_argument("model", metavar="MODEL", help="run folder, checkpoint (or a URL of one) or export")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        command.add_argument("--no-ema", action="store_true", help="use the weights, not their average")

    command = add(train)
    command.add_argument("recipe", metavar="RECIPE", help="recipe file; key=value overrides may follow")
    command = add(plan)
    command.add_argument("recipe", metavar="RECIPE", help="recipe file; key=value overrides may follow")
    command.add_argument("--gpus", type=int, default=8, help="number of GPUs (%(default)s)")
    command.add_argument("--gpu", default="h100-80g", help="kind of GPU (%(default)s)")
    command = add(import_)
    command.add_argument(
        "out",
        metavar="OUT",
        help="folder to write; model.* overrides such as model.decoder.num_shared_layers=12 may follow",
    )
    command.add_argument("--llm", metavar="DIR", required=True, help="Qwen3ForCausalLM")
    command.add_argument("--vision", metavar="DIR", required=True, help="SiglipVisionModel or SiglipModel")
    command.add_argument("--autoencoder", metavar="DIR", required=True, help="AutoencoderDC (diffusers)")
    command.add_argument("--tokenizer", metavar="DIR", help="tokenizer.json or its folder (that of --llm)")
    command = add(inspect)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint, or a URL of one")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the metadata as JSON")
    how.add_argument("--verify", action="store_true", help="read every byte of all checkpoints there; exit 1 on damage")
    how.add_argument("--self-contained", metavar="OUT", help="copy the newest one, with its frozen weights, to OUT")
    command = add(export)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint, or a URL of one")
    command.add_argument("out", metavar="OUT", help="folder to write")
    command.add_argument("--no-ema", action="store_true", help="export the weights, not their average")
    command.add_argument(
        "--as",
        dest="format",
        choices=("emma", "qwen3"),
        default="emma",
        help="emma: the whole model, for generate and init.from; qwen3: what understands, as transformers loads it "
        "(%(default)s)",
    )
    command = add(generate)
    add_model(command)
    command.add_argument("--task", choices=("i2t", "t2i", "it2i"), required=True)
    command.add_argument("--prompt", nargs="+", required=True, help="questions, prompts or instructions")
    command.add_argument("--image", nargs="+", default=[], help="images to ask about or to edit")
    command.add_argument("--out", default="generated", help="folder for images (%(default)s)")
    command.add_argument("--num", type=int, default=1, help="answers or images per prompt (%(default)s)")
    command.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of the image in pixels")
    own = command.add_argument_group(
        "how to generate", "not given: as the export says, else the recipe's shift and our defaults"
    )
    own.add_argument("--steps", type=int, help="flow steps")
    own.add_argument("--solver", choices=("euler", "heun"), help="of the flow")
    own.add_argument("--shift", type=float, help="of the flow's time; larger images need more")
    own.add_argument("--text-guidance", type=float, help="strength of the prompt")
    own.add_argument("--image-guidance", type=float, help="strength of the reference")
    own.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    own.add_argument("--max-tokens", type=int, help="longest answer")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--batch", type=int, default=16, help="images at once (%(default)s)")
    command = add(evaluate)
    add_model(command)
    command.add_argument("--benchmark", choices=("emoji",), default="emoji")
    command.add_argument("--data", default="recipes/tiny/assets/emoji", help="folder with the held-out splits")
    command.add_argument("--limit", type=int, default=96, help="images to draw per split; 0 draws all (%(default)s)")
    command.add_argument("--out", help="where to write the scores (MODEL/scores.json)")
    command = add(report)
    command.add_argument("run_folder", metavar="RUN", help="run folder of a stage or a pipeline")
    add(doctor)
    add_launch_arguments(add(launch))
    return parser


def _set_up_logging() -> None:
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("httpx", "filelock", "torch", "PIL", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
