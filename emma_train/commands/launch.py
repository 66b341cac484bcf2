"""Start or submit a run; checks first what can be known, and prints the exact command or script."""

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launchers import add_launch_arguments

if TYPE_CHECKING:
    from emma_train.preflight import Stages
    from launchers import LaunchOptions

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launch_arguments(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Start torchrun or submit the job, in the folder to which the paths of the recipe belong."""
    from emma_train.config.load import load_stages, recipe_files
    from emma_train.preflight import working_folder
    from launchers import Job, LaunchOptions, first_of_array, launch

    path = Path(arguments.recipe)
    options = LaunchOptions.from_arguments(arguments)
    stages = load_stages(path, first_of_array(options, overrides))
    path, workdir = path.resolve() if options.on == "slurm" else path, working_folder(path, stages)
    if workdir != Path.cwd():
        log.info("the paths of %s belong to %s: the run starts there", path, workdir)
        path = path.resolve()
    os.chdir(workdir)
    node_counts = _check(stages, options)
    workers = max(recipe.data.workers for _, recipe in stages)
    job = Job(_run_folder(path, overrides, options), workdir, workers, node_counts)
    return launch(path, recipe_files(path), overrides, options, job)


def _check(stages: "Stages", options: "LaunchOptions") -> list[int]:
    """Raise UserError on what would end the run at its start; a dry run may lack inputs that another machine has.

    Returns the numbers of nodes on which an elastic job can train; none for a fixed number.
    """
    from emma_train.commands.plan import index_reader
    from emma_train.errors import UserError
    from emma_train.preflight import absent_inputs, check_start, node_counts
    from launchers.command import default_nproc

    absent = absent_inputs(stages)
    if absent and not options.dry_run:
        raise UserError(f"{'; '.join(absent)} (relative paths belong to {Path.cwd()})")
    for line in absent:
        log.warning(line)
    of_node = options.nproc or (options.gpus_per_node or 1 if options.on == "slurm" else default_nproc())
    if options.min_nodes is None:
        check_start(stages, options.nnodes * of_node, options.gpu, index_reader)
        return []
    counts = node_counts(stages, range(options.min_nodes, options.nnodes + 1), of_node)
    # Fewer nodes have more of the model on each GPU; otherwise all that can share the packs are alike.
    for count in counts[:1] or [options.nnodes]:
        check_start(stages, count * of_node, options.gpu, index_reader)
    if len(counts) == 1:
        log.warning("of %d to %d nodes, only %d can share data.slots", options.min_nodes, options.nnodes, counts[0])
    return counts


def _run_folder(path: Path, overrides: list[str], options: "LaunchOptions") -> Path:
    """The run folder of a stage or of a pipeline, with {array} still in its name."""
    from emma_train.config.load import is_pipeline, load_pipeline, load_recipe
    from launchers import ARRAY, first_of_array

    # YAML reads braces as a mapping.
    words = [word.replace(ARRAY, "ARRAY-NUMBER") if word.startswith("run.") else word for word in overrides]
    words = first_of_array(options, words)
    run_config = (load_pipeline(path, words)[0] if is_pipeline(path) else load_recipe(path, words)).run
    return Path(str((Path(run_config.root) / run_config.name).resolve()).replace("ARRAY-NUMBER", ARRAY))
