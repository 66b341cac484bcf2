"""TensorBoard as a tracker: event files in the run folder's tensorboard/."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from emma_train.errors import UserError
from emma_train.monitor.trackers import Guard, Values, read_samples

if TYPE_CHECKING:
    pass

FOLDER = "tensorboard"


class TensorboardTracker:
    """Numbers as scalars, samples as images and texts by their number in the list of prompts.

    After a resume, TensorBoard drops the steps that run again. Raises UserError where tensorboard is not installed.
    """

    run_id: str | None = None

    def __init__(self, run_folder: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tracker.kind is tensorboard, which is not installed: pip install -e .[tensorboard]"
            ) from None
        purge = None if resume_step is None else resume_step + 1
        self._writer: SummaryWriter = SummaryWriter(str(run_folder / FOLDER), purge_step=purge)
        self._guard = Guard(FOLDER)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def samples(self, step: int, folder: Path) -> None:
        self._guard("samples", lambda: self._log_samples(step, folder))

    def _log_samples(self, step: int, folder: Path) -> None:
        for number, entry in enumerate(read_samples(folder)):
            name = f"samples/{number} {entry['task']}"
            if "file" in entry:
                files = [entry[key] for key in ("reference", "file", "target") if entry.get(key)]
                images = [np.asarray(Image.open(folder / file).convert("RGB")) for file in files]
                height = min(image.shape[0] for image in images)
                row = np.concatenate([image[:height] for image in images], axis=1)
                self._writer.add_image(name, row, step, dataformats="HWC")
            lines = [f"{key}: {entry[key]}" for key in ("prompt", "answer", "truth") if entry.get(key)]
            self._writer.add_text(name, "  \n".join(lines), step)

    def alert(self, title: str, text: str) -> None:
        """TensorBoard has no alerts; the log has a warning."""

    def finish(self, exit_code: int) -> None:
        self._writer.close()
