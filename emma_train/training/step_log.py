"""Where the main rank shows its steps: trackers and the progress bar."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.config.load import to_stored
from emma_train.config.schema import Recipe
from emma_train.monitor.progress import Progress
from emma_train.monitor.trackers import make_trackers
from emma_train.training.run_folder import RunFolder


class StepLog:
    """Trackers and progress bar of one stage; only the main rank has one."""

    def __init__(self, recipe: Recipe, run: RunFolder, step: int, run_id: str | None) -> None:
        """`step`: the last one that is done; `run_id`: of the tracker's run that is continued."""
        self._trackers = make_trackers(
            recipe.tracker.kind,
            run.path,
            to_stored(recipe),
            step,
            run_id,
            project=recipe.tracker.project,
            group=Path(recipe.run.root).name,
        )
        self.run_id = self._trackers.run_id
        self._progress = Progress(recipe.stage.name, recipe.train.steps, step)

    def log(self, step: int, values: Mapping[str, Any], images: Sequence[Path], alerts: Sequence[str] = ()) -> None:
        """Metrics and sample images of a step, and signs that understanding is being forgotten."""
        self._trackers.log(step, {**values, "time_unix": time.time()})
        self._trackers.images(step, "samples", list(images), [path.stem for path in images])
        for text in alerts:
            self._trackers.alert("understanding is being forgotten", f"step {step}: {text}")

    def show(self, step: int, values: Mapping[str, Any] | None) -> None:
        """Move the progress bar; `values`: the metrics of the step where they are known."""
        self._progress.update(step, values)

    def close(self, exit_code: int) -> None:
        self._progress.close()
        self._trackers.finish(exit_code)
