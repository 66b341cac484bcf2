"""Weights & Biases as a tracker."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emma_train.config.schema import TrackerConfig
from emma_train.monitor.trackers import Guard, Values, read_samples

log = logging.getLogger(__name__)
ONLINE = ("online", "shared")
START_TIMEOUT_S = 15.0
"""A server that does not answer within this time is taken as unreachable."""
FINISH_TIMEOUT_S = 60.0
COLUMNS = ("step", "task", "prompt", "reference", "image", "target", "answer", "truth")

LoggedTable = tuple[Sequence[str], Sequence[Sequence[Any]]]


class WandbTracker:
    """Logs to Weights & Biases: offline below the run folder, unless WANDB_MODE or WANDB_API_KEY is set.

    Where the server does not answer at the start, the run is kept offline, and a warning says how to send it later.
    Every kind of failure is logged once. If wandb cannot start, `run_id` stays as given and calls do nothing.
    """

    def __init__(
        self, run_folder: Path, name: str, config: dict[str, Any], tracker: TrackerConfig, run_id: str | None = None
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._guard = Guard("wandb")
        self._guard("start", lambda: self._start(run_folder, name, config, tracker))

    def _start(self, run_folder: Path, name: str, config: dict[str, Any], tracker: TrackerConfig) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run_folder.mkdir(parents=True, exist_ok=True)
        try:
            run = self._init(mode, run_folder, name, config, tracker)
        except Exception as error:  # what wandb raises where a server hangs, fails or refuses differs by version
            if mode not in ONLINE:
                raise
            log.warning(
                "wandb: the server did not answer (%s); this run is kept offline, send it with: wandb sync %s",
                " ".join(str(error).split()),
                run_folder / "wandb" / "offline-run-*",
            )
            run = self._init("offline", run_folder, name, config, tracker)
        # wandb's built-in step can only increase, but a resumed run repeats steps: use our own as the x axis.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run, self.run_id = run, run.id

    def _init(self, mode: Any, run_folder: Path, name: str, config: dict[str, Any], tracker: TrackerConfig) -> Any:
        import wandb  # takes a third of a second, and not every run needs it

        return wandb.init(
            entity=tracker.entity or None,
            project=tracker.project,
            name=name,
            group=tracker.group or None,
            tags=tracker.tags or None,
            notes=tracker.notes or None,
            config=config,
            dir=str(run_folder),
            id=self.run_id,
            mode=mode,
            # Offline, a resumed run gets a second folder with the same id; the server joins them at `wandb sync`.
            resume="allow" if self.run_id and mode in ONLINE else None,
            settings=wandb.Settings(
                silent=mode != "online", init_timeout=START_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S
            ),
        )

    @property
    def is_open(self) -> bool:
        """Whether wandb has started and takes values."""
        return self._run is not None

    def log(self, step: int, values: Values) -> None:
        if self._run is not None:
            self._guard("log", lambda: self._run.log({"step": step, **values}))

    def samples(self, step: int, folder: Path) -> None:
        if self._run is not None:
            self._guard("samples", lambda: self._log_samples(step, folder))

    def _log_samples(self, step: int, folder: Path) -> None:
        """The generated images with their prompts, and a table with references, targets and answers beside them."""
        import wandb

        listed = read_samples(folder)
        images = [wandb.Image(str(folder / e["file"]), caption=str(e["prompt"])) for e in listed if "file" in e]
        table = wandb.Table(columns=list(COLUMNS))
        for entry in listed:
            files = {"reference": entry.get("reference"), "image": entry.get("file"), "target": entry.get("target")}
            shown = {name: wandb.Image(str(folder / file)) for name, file in files.items() if file}
            table.add_data(*({"step": step, **entry, **shown}.get(column) for column in COLUMNS))
        self._run.log({"step": step, **({"samples": images} if images else {}), "samples/table": table})

    def log_tables(self, step: int, values: Values, tables: Mapping[str, LoggedTable]) -> None:
        """Values, and tables by key: (names of the columns, rows). An array of a row becomes an image."""
        if self._run is not None:
            self._guard("tables", lambda: self._log_tables(step, values, tables))

    def _log_tables(self, step: int, values: Values, tables: Mapping[str, LoggedTable]) -> None:
        import wandb

        made = {}
        for key, (columns, rows) in tables.items():
            made[key] = wandb.Table(columns=list(columns))
            for row in rows:
                made[key].add_data(*(wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row))
        self._run.log({"step": step, **values, **made})

    def alert(self, title: str, text: str) -> None:
        if self._run is not None:
            self._guard("alert", lambda: self._run.alert(title=title, text=text, level="WARN"))

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None
