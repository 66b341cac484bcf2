"""Compare arms of a recipe over several seeds, in pairs; resumes arm by arm."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from emma_train.errors import RunError, UserError, check_range

if TYPE_CHECKING:
    from emma_train.ablation.design import Ablation, Trial
    from emma_train.ablation.processes import TrialJob

log = logging.getLogger(__name__)
MOST_JOBS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ablation", metavar="ABLATION", help="YAML file; key=value overrides of all arms may follow")
    parser.add_argument("--out", default="", help="results, one line for each arm and seed (as ABLATION says)")
    parser.add_argument("--root", default="runs/ablations", help="folder of the runs (%(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once; GPUs are shared out among them (%(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, and the table of what is finished"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Train and score what has no line in the results yet, and print the table. Returns 75 where it was asked to stop;
    the same command then goes on."""
    from emma_train.ablation.design import load_ablation, trials_of
    from emma_train.ablation.processes import EXIT_STOPPED, run_all
    from emma_train.ablation.results import read_results, without_result
    from emma_train.storage.files import output_file
    from emma_train.training.preemption import StopRequest

    check_range("--jobs", arguments.jobs, 1, MOST_JOBS)
    ablation = load_ablation(Path(arguments.ablation), overrides)
    if not (out := arguments.out or ablation.out):
        raise UserError(f"{ablation.path}: names no file for the results; add out, or give --out FILE")
    out = Path(out) if arguments.dry_run else output_file("--out", Path(out))
    trials = trials_of(ablation, arguments.root)
    left = without_result(trials, read_results(out), out)
    log.info("%d of %d trials have a line in %s", len(trials) - len(left), len(trials), out)
    if arguments.dry_run:
        for trial in left:
            print(f"{trial.name}: {' '.join(_train_command(trial)[1:])}")
        print(_table(ablation, out))
        return 0
    environments = _environments(arguments.jobs)
    all_jobs = [_job_of(ablation, trial, out, Path(arguments.root)) for trial in left]
    with StopRequest() as stop:
        failures, stopped = run_all(all_jobs, environments, lambda: stop.asked)
    print(_table(ablation, out))
    if failures:
        raise RunError(f"{len(failures)} of {len(left)} trials failed; the first: {failures[0]}")
    return EXIT_STOPPED if stopped else 0


def _table(ablation: "Ablation", out: Path) -> str:
    from emma_train.ablation.results import read_results
    from emma_train.ablation.table import ablation_table

    arms = [arm.name for arm in ablation.arms]
    return ablation_table(ablation.question, arms, ablation.metrics, read_results(out))


def _job_of(ablation: "Ablation", trial: "Trial", out: Path, root: Path) -> "TrialJob":
    from emma_train.ablation.processes import TrialJob
    from emma_train.ablation.results import append_result, result_of, scores_file

    commands = [_train_command(trial)]
    if trial.arm.options is not None:
        folder, scores = str(trial.run_folder), str(scores_file(trial))
        commands.append([sys.executable, "-m", "emma_train", "evaluate", folder, "--out", scores, *trial.arm.options])

    def finish() -> None:
        append_result(out, result_of(trial, _flops(trial, str(ablation.path))))
        log.info("%s: finished, one more line in %s", trial.name, out)

    return TrialJob(trial.name, trial.folder, commands, root / "logs" / f"{trial.folder.name}.log", finish)


def _train_command(trial: "Trial") -> list[str]:
    return [sys.executable, "-m", "emma_train", "train", str(trial.arm.recipe), *trial.overrides]


def _flops(trial: "Trial", source: str) -> float:
    """Useful FLOPs of all steps of all stages."""
    from emma_train.commands.plan import index_reader
    from emma_train.plan import Plan

    total = 0.0
    for recipe in trial.stages:
        plan = Plan(recipe, source, 1, "h100-80g", read_index_rows=index_reader(recipe))
        for load, steps in zip(plan.loads, plan.phase_steps, strict=True):
            total += steps * sum(plan.flops(load).values())
    return total


def _environments(jobs: int) -> list[dict[str, str]]:
    """An environment for each run at once: a GPU, or an equal share of the CPU's threads."""
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(number) for number in range(num_gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[job % num_gpus]} for job in range(jobs)]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}] * jobs
