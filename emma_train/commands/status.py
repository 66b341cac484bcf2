"""Say in a few lines what a run is doing, from any machine that sees its folder."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emma_train.monitor.run_state import RunState

EVERY_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder of a stage or a pipeline")
    parser.add_argument(
        "--next-samples",
        action="store_true",
        help="the keys of the samples up to the next logged step, for a run that fails at every start",
    )
    parser.add_argument("--watch", action="store_true", help=f"again every {EVERY_S:g} seconds, until Ctrl-C")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the state of every stage. Raises UserError if the folder holds no run."""
    folder = Path(arguments.run_folder)
    if arguments.next_samples:
        for step, keys in next_samples(folder).items():
            sys.stdout.write(f"step {step}: {' '.join(keys)}\n")
        return 0
    while True:
        text = status_text(folder)
        clear = "\033[H\033[2J" if arguments.watch and sys.stdout.isatty() else ""
        sys.stdout.write(f"{clear}{text}\n")
        sys.stdout.flush()
        if not arguments.watch:
            return 0
        try:
            time.sleep(EVERY_S)
        except KeyboardInterrupt:
            return 0


def status_text(folder: Path) -> str:
    """A line for each stage, and three about the newest that has started. Raises UserError if it holds no run."""
    from emma_train.errors import UserError

    stages = _stages(folder)
    if not stages:
        if launched := _launch_line(folder):
            return launched
        raise UserError(f"{folder} holds no run: neither metrics.jsonl nor config.yaml is here or one folder below")
    width = max(len(stage.name) for stage in stages)
    current = stages[_newest(stages)]
    return "\n".join([*(_line(stage, width) for stage in stages), *_start_lines(current), *_time_lines(current)])


def next_samples(folder: Path) -> dict[int, list[str]]:
    """Keys of the samples of each step from the last logged one to the next that would be logged, of the newest stage.
    Raises UserError where the folder holds no run, or what it reads is not on this machine."""
    from data_pipelines.planner.planner import Planner
    from emma_train.checkpoint import folder as folders
    from emma_train.config.load import load_recipe
    from emma_train.errors import UserError
    from emma_train.report.stage_run import stage_folders
    from emma_train.sequence.tokens import TextTokenizer

    stages = _stages(folder)
    if not stages:
        raise UserError(f"{folder} holds no run")
    number = _newest(stages)
    path, last = stage_folders(folder)[number], stages[number].step
    recipe = load_recipe(path / "config.yaml")
    planner = Planner(recipe, TextTokenizer(recipe.data.tokenizer, recipe.data.template))
    checkpoint = folders.newest_checkpoint(path / "checkpoints")
    if checkpoint is not None:
        state = (folders.read_meta(checkpoint) or {})["data"]
        planner.load(state["step"], state)
    steps = range(last + 1, min(last + recipe.train.log_every, recipe.train.steps) + 1)
    return {step: [sample.key for slot in planner.plan(step).slots for sample in slot] for step in steps}


def _stages(folder: Path) -> "list[RunState]":
    """The state of every stage, in their order; empty where the folder holds none."""
    from emma_train.monitor.run_state import read_run_state
    from emma_train.report.stage_run import stage_folders

    return [read_run_state(stage) for stage in stage_folders(folder)] if folder.is_dir() else []


def _newest(stages: "list[RunState]") -> int:
    """Index of the newest stage that has started."""
    return max((number for number, stage in enumerate(stages) if stage.starts or stage.holder), default=len(stages) - 1)


def _launch_line(folder: Path) -> str:
    """Of a run whose job has not begun to train; empty where nothing was launched."""
    records = sorted(folder.glob("launches/*/launch.json"))
    try:
        launch = json.loads(records[-1].read_text())
        when = f"launched {launch['time']} on {launch['nodes']} nodes"
    except (IndexError, OSError, ValueError, KeyError):
        return ""
    return f"{folder.name}  {when}, not training yet: see squeue and {folder / 'logs'}"


def _line(stage: "RunState", width: int) -> str:
    from emma_train.monitor.progress import duration, loss_and_speed

    parts = [f"{stage.name:{width}}  {stage.state:11}  {stage.step}/{stage.steps or '?'}"]
    if stage.row:
        parts.append(loss_and_speed(stage.row))
    if stage.state == "running" and stage.left_s is not None:
        parts.append(f"eta {duration(stage.left_s)}")
    if stage.state != "done" and stage.saved:
        parts.append(f"saved {stage.saved}")
    return "  ".join(parts)


def _start_lines(stage: "RunState") -> list[str]:
    lines = []
    if stage.state in ("running", "crashed"):
        holder = stage.holder
        job = f", SLURM job {holder['job']}" if holder.get("job") else ""
        verb = "trains" if stage.state == "running" else "is gone"
        lines.append(f"process {holder.get('pid')} on {holder.get('host')}{job} {verb}, since {holder.get('since')}")
    if stage.starts:
        sizes = ", ".join(str(size) for size in stage.world_sizes[-10:])
        commit = stage.starts[-1].get("commit") or "unknown"
        lines.append(f"{stage.name}: {len(stage.starts)} starts; ranks of each: {sizes}; commit {commit}")
    return lines


def _time_lines(stage: "RunState") -> list[str]:
    """The share of useful steps in the time of all starts, and what else took at least 0.1 % of it."""
    from emma_train.monitor.goodput import CAUSES
    from emma_train.monitor.progress import duration

    if (ledger := stage.ledger) is None or ledger.wall_s <= 0:
        return []
    others = sorted(((s, cause) for cause, s in ledger.seconds.items() if cause != "steps"), reverse=True)
    shares = [f"{CAUSES[cause]} {s / ledger.wall_s:.1%}" for s, cause in others if s >= 0.001 * ledger.wall_s]
    goodput = f"{stage.name}: goodput {ledger.goodput:.1%} of {duration(ledger.wall_s)}"
    return [", ".join([goodput, *shares])]
