"""The trackers that a recipe asks for."""

from pathlib import Path
from typing import Any

from emma_train.config.schema import TrackerConfig
from emma_train.monitor.tensorboard_tracker import TensorboardTracker
from emma_train.monitor.trackers import JsonlTracker, Tracker, Trackers
from emma_train.monitor.wandb_tracker import WandbTracker


def make_trackers(
    tracker: TrackerConfig,
    run_folder: Path,
    config: dict[str, Any],
    resume_step: int | None = None,
    run_id: str | None = None,
) -> Trackers:
    """metrics.jsonl always, and those of tracker.kind.

    resume_step: step of the checkpoint that the run continues, 0 for a new run, None to keep every record.
    run_id: W&B's id of the run before a restart. Raises UserError where tensorboard is not installed.
    """
    trackers: list[Tracker] = [JsonlTracker(run_folder / "metrics.jsonl", resume_step)]
    if "wandb" in tracker.kind:
        trackers.append(WandbTracker(run_folder, run_folder.name, config, tracker, run_id))
    if "tensorboard" in tracker.kind:
        trackers.append(TensorboardTracker(run_folder, resume_step))
    return Trackers(trackers)
