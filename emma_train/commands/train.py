"""Train a stage or a pipeline; resumes where its run folder has a checkpoint."""

import argparse
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipelines.loader.loader import Stream
    from emma_train.config.schema import Recipe
    from emma_train.engine.world import World
    from emma_train.generate.generator import Generator
    from emma_train.sequence.request import Request
    from emma_train.sequence.validation_batches import ValidationBatches
    from emma_train.stages.stage import Stage
    from emma_train.storage.paths import StoragePath
    from emma_train.training.loop import Trainer
    from emma_train.training.preemption import StopRequest
    from emma_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file; key=value overrides may follow")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train every stage that is not complete yet, one after the other, in one group of processes."""
    begun_unix = time.time()  # before torch is imported
    from emma_train.config.load import load_stages
    from emma_train.engine.world import join, share_packs
    from emma_train.stages.stage import stage_of
    from emma_train.training.preemption import EXIT_PREEMPTED, StopRequest

    stages = load_stages(Path(arguments.recipe), overrides)
    for file, recipe in stages:
        stage_of(recipe, str(file))
    first, last = stages[0][1], stages[-1][1]
    # One process group for all stages: gloo cannot be destroyed and initialised again within a process.
    traces = Path(first.run.root) / first.run.name / "logs" / "nccl-rank-"
    with join(first.engine.device, first.engine.timeout_s, traces) as world, StopRequest() as stop:
        _log_world(world)
        for file, recipe in stages:
            if world.sum([float(stop.asked)])[0]:
                return EXIT_PREEMPTED
            stage_world = share_packs(world, recipe.engine.sequence_parallel)
            if code := _train_stage(file, recipe, stage_world, stop, begun_unix):
                return code
            begun_unix = time.time()
        if world.is_main and len(stages) > 1:
            _try_report(Path(last.run.root))
    return 0


def _log_world(world: "World") -> None:
    """The ranks of each node, because errors name ranks, and the code that runs."""
    from emma_train.checkpoint.nodes import this_node
    from emma_train.training.environment import commit

    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(world.gather(this_node())):
        ranks.setdefault(host, []).append(rank)
    nodes = ", ".join(
        f"{host} (ranks {of[0]} to {of[-1]})" if len(of) > 1 else f"{host} (rank {of[0]})" for host, of in ranks.items()
    )
    log.info("%d ranks of type %s on %s, commit %s", world.size, world.device.type, nodes, commit() or "unknown")


def _train_stage(file: Path, recipe: "Recipe", world: "World", stop: "StopRequest", begun_unix: float) -> int:
    """Train one stage under the lock of its run folder, unless it is complete. Returns the exit code. `begun_unix`:
    when the process began with it."""
    from emma_train.checkpoint import folder as folders
    from emma_train.checkpoint.local_folder import check_local_folder
    from emma_train.training.rewind import REWIND, set_aside_rewound
    from emma_train.training.run_folder import RunFolder
    from emma_train.training.run_lock import RunLock

    run_folder = RunFolder(recipe)
    run_folder.check_checkpoints(world)
    newest = world.on_main(lambda: folders.newest_checkpoint(run_folder.checkpoints))
    if newest is not None and (folders.read_meta(newest) or {})["step"] >= recipe.train.steps:
        log.info("%s is complete: nothing to do", run_folder.path)
        return 0
    with ExitStack() as locks:

        def lock() -> None:
            locks.enter_context(RunLock(run_folder.path))

        world.on_main(lock)
        if recipe.train.local_every and run_folder.local_checkpoints is not None:
            check_local_folder(run_folder.local_checkpoints, world)
        while True:
            world.on_main(lambda: set_aside_rewound(run_folder))
            if (code := _train_locked(run_folder, file, recipe, world, stop, begun_unix)) != REWIND:
                return code
            begun_unix = time.time()


def _train_locked(
    run_folder: "RunFolder", file: Path, recipe: "Recipe", world: "World", stop: "StopRequest", begun_unix: float
) -> int:
    """Build the data stream, model, engine and loop of one stage, and train it. Returns the exit code, or REWIND."""
    from data_pipelines.loader.loader import Stream
    from emma_train.export.content import content_hashes
    from emma_train.generate.generator import Generator
    from emma_train.model.autoencoder import Autoencoder
    from emma_train.sequence.image_rules import image_rules
    from emma_train.sequence.tokens import TextTokenizer
    from emma_train.stages.stage import stage_of
    from emma_train.training.build import build
    from emma_train.training.loop import Trainer

    checkpoint = _find_checkpoint(run_folder, world)
    recipe = _with_stored_values(recipe, checkpoint, world)
    stage = stage_of(recipe, str(file))
    autoencoder = Autoencoder(recipe.model.autoencoder, world.device, load=False)
    tokenizer = TextTokenizer(recipe.data.tokenizer, recipe.data.template)
    _check_content(recipe, checkpoint, content_hashes(tokenizer, autoencoder.fingerprint), world)
    stream = Stream(recipe, world.dp_rank, world.dp_size, autoencoder.fingerprint, pin=world.device.type == "cuda")
    if checkpoint is None:
        world.on_main(run_folder.check_new)
        stream.planner.check()
        if stage.loss == "router":
            stream.planner.check_labels()
    requests = _sample_requests(recipe, stage)
    held_out = _held_out(recipe, stage, world, autoencoder.fingerprint)
    parts = build(recipe, stage, world, resuming=checkpoint is not None)
    if parts.handoff is not None:
        log.info("from %s: %s", recipe.init.source, "; ".join(parts.handoff.lines()))
    generate_samples = None
    if requests:
        vision = recipe.model.vision
        generator = Generator(
            parts.engine.model,
            autoencoder,
            tokenizer,
            vision.patch,
            vision.shuffle,
            rules=image_rules(recipe.model),
        )
        generate_samples = _sample_writer(generator, requests, recipe, run_folder, world.is_main)
    trainer = Trainer(recipe, stage, world, parts, autoencoder, stream, generate_samples, held_out)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    world.on_main(lambda: run_folder.prepare(recipe, world, trainer.train_state.step))
    code = _train_steps(trainer, stream, world, stop, begun_unix)
    parts.engine.close()
    if world.is_main and code == 0:
        _try_report(run_folder.path)
    return code


def _find_checkpoint(run_folder: "RunFolder", world: "World") -> "StoragePath | None":
    """The newest checkpoint that the run can resume from, local ones included; None where it has none yet. Every rank
    calls it."""
    from emma_train.checkpoint import verify
    from emma_train.checkpoint.local_restore import restore_local
    from emma_train.training.rewind import has_trained, read_rewinds

    if (folder := run_folder.local_checkpoints) is not None:
        rewinds = world.on_main(lambda: read_rewinds(run_folder))
        restore_local(folder, run_folder.checkpoints, world, lambda meta: not has_trained(rewinds, meta))
    return verify.find_resumable(run_folder.checkpoints, world)


def _train_steps(trainer: "Trainer", stream: "Stream", world: "World", stop: "StopRequest", begun_unix: float) -> int:
    """Run the steps while heartbeats tell the other ranks that this one lives. Returns the exit code."""
    from data_pipelines.loader.loader import dead_worker
    from emma_train.engine.heartbeat import Heartbeat
    from emma_train.engine.stall_watch import StallWatch

    try:
        watch = StallWatch(world, trainer.run.path / "logs", stream.describe)
        with Heartbeat(world, watch.own_hang), watch:
            return trainer.train(stop, watch, begun_unix)
    except (RuntimeError, ConnectionError) as error:  # torch raises it wherever the trainer is when a worker dies
        if (failure := dead_worker(error)) is None:
            raise
        raise failure from None


def _check_content(recipe: "Recipe", checkpoint: "StoragePath | None", content: dict[str, str], world: "World") -> None:
    """Raise UserError where tokenizer or autoencoder are others than those of the weights to go on with."""
    from emma_train.checkpoint import folder as folders
    from emma_train.export import export
    from emma_train.export.content import check_content
    from emma_train.storage.paths import parse_path

    def read_meta() -> dict[str, Any]:
        given = checkpoint or parse_path(str(recipe.init.source))
        if checkpoint is None and export.is_export(given):
            return export.read_export_meta(given)
        return folders.read_meta(checkpoint or folders.find_checkpoint(given)) or {}

    if checkpoint is not None:
        check_content(world.on_main(read_meta), content, str(checkpoint), recipe.resume.allow)
    elif recipe.init.source:
        check_content(world.on_main(read_meta), content, f"init.from {recipe.init.source}")


def _with_stored_values(recipe: "Recipe", checkpoint: "StoragePath | None", world: "World") -> "Recipe":
    """The recipe with the stored value where it leaves a field unset and the field must stay as it was.

    The stored values are those of the checkpoint to resume, or else of what init.from names.
    """
    from emma_train.checkpoint import folder as folders
    from emma_train.export import export
    from emma_train.stages.handoff import recipe_to_start
    from emma_train.storage.paths import parse_path
    from emma_train.training.build import stored_config
    from emma_train.training.resume_rule import check_allowed_keys, recipe_to_resume

    if checkpoint is not None:
        step = (folders.read_meta(checkpoint) or {})["step"]
        return recipe_to_resume(recipe, stored_config(checkpoint), str(checkpoint), step)
    check_allowed_keys(recipe, {})
    if not recipe.init.source:
        return recipe
    given = parse_path(recipe.init.source)

    def read() -> dict[str, Any]:
        if not export.is_export(given):
            return stored_config(folders.find_checkpoint(given, "init.from"))
        export.read_export_meta(given)  # it raises where the recipe is not what was exported
        return stored_config(given)

    return recipe_to_start(recipe, world.on_main(read))


def _sample_requests(recipe: "Recipe", stage: "Stage") -> "list[Request]":
    """Requests for the sample images and answers of a run: train.num_samples of each task in the stage's mix."""
    from data_pipelines.loader.requests import read_requests
    from emma_train.config.mix import phases

    if not recipe.train.sample_from or stage.loss != "tokens":
        return []
    folder, pixels = recipe.train.sample_from, recipe.model.autoencoder.pixels
    tasks = [task for task in stage.tasks if any(getattr(phase.mix, task) for phase in phases(recipe))]
    return [
        request
        for task in tasks
        for request in read_requests(folder, task, recipe.data, pixels, recipe.train.num_samples)
    ]


def _held_out(
    recipe: "Recipe", stage: "Stage", world: "World", autoencoder_fingerprint: str | None
) -> "ValidationBatches | None":
    """What this rank validates on; None where the recipe validates never. Router tuning answers no questions."""
    from data_pipelines.loader.held_out import read_validation_batches

    if not recipe.validate.every:
        return None
    return read_validation_batches(
        recipe, world.dp_rank, world.dp_size, autoencoder_fingerprint, ask=stage.loss == "tokens"
    )


def _sample_writer(
    generator: "Generator", requests: "list[Request]", recipe: "Recipe", run_folder: "RunFolder", write: bool
) -> "Callable[[int], Path | None]":
    """A function of the step that answers the requests and writes the samples of that step."""
    from emma_train.generate.samples import write_samples
    from emma_train.generate.settings import FlowSettings, TextSettings

    flow, text = FlowSettings.of(recipe), TextSettings(max_tokens=8, fixed_length=True)
    return lambda step: write_samples(generator, requests, run_folder.samples(step), flow, text, write=write)


def _try_report(run_folder: Path) -> None:
    """Write the report of a finished run; where that fails, the training still counts as done."""
    from emma_train.report.report import write_report

    try:
        log.info("report: %s", write_report(run_folder))
    except Exception as error:
        log.warning("no report of %s: %s", run_folder, error)
