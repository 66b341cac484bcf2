"""Where the main rank shows its steps: trackers and the progress bar."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.config.load import to_stored
from emma_train.config.schema import Recipe
from emma_train.monitor.make_trackers import make_trackers
from emma_train.monitor.progress import Progress
from emma_train.training.run_folder import RunFolder


class StepLog:
    """Trackers and progress bar of one stage; only the main rank has one."""

    def __init__(self, recipe: Recipe, run: RunFolder, step: int, run_id: str | None) -> None:
        """`step`: the last one that is done; `run_id`: of the tracker's run that is continued."""
        self._trackers = make_trackers(recipe.tracker, run.path, to_stored(recipe), resume_step=step, run_id=run_id)
        self._skipped: float | None = None
        self.run_id = self._trackers.run_id
        self._progress = Progress(recipe.stage.name, recipe.train.steps, step)

    def after_step(
        self, step: int, values: Mapping[str, Any] | None, samples: Path | None, forgotten: Sequence[str] = ()
    ) -> None:
        """`values`: metrics of the step, where it is logged; `samples`: the folder of its sample images and answers,
        where there are some; `forgotten`: signs that understanding is being forgotten."""
        if values is not None:
            self._trackers.log(step, {**values, "time_unix": time.time()})
            self._alert(step, values, forgotten)
        if samples is not None:
            self._trackers.samples(step, samples)
        self._progress.update(step, values)

    def _alert(self, step: int, values: Mapping[str, Any], forgotten: Sequence[str]) -> None:
        """Tell whoever watches the run of what may need them."""
        for text in forgotten:
            self._trackers.alert("understanding is being forgotten", f"step {step}: {text}")
        if values.get("health/spike"):
            self._trackers.alert("the loss is far above what it was", f"step {step}: loss {values['loss']:.4g}")
        skipped = values.get("steps/skipped", 0)
        if self._skipped is not None and skipped > self._skipped:
            self._trackers.alert("a gradient was not finite", f"step {step}: {skipped:g} steps were skipped so far")
        self._skipped = skipped

    def close(self, exit_code: int) -> None:
        self._progress.close()
        self._trackers.finish(exit_code)
