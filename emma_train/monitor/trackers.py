"""Where metrics go: metrics.jsonl always, Weights & Biases on request. A tracker that fails never stops training."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from emma_train.errors import UserError
from emma_train.storage.files import replacing

log = logging.getLogger(__name__)

Values = dict[str, float | int | str]


class Tracker(Protocol):
    """Receives the metrics and images of a run. Only rank 0 has one."""

    @property
    def run_id(self) -> str | None:
        """The id with which the tracker continues this run after a restart; None if it needs none."""

    def log(self, step: int, values: Values) -> None:
        """Metrics of one optimizer step."""

    def images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
        """Sample images of one step, one caption each."""

    def alert(self, title: str, text: str) -> None:
        """Something that whoever watches the run should know."""

    def finish(self, exit_code: int) -> None:
        """The run ends with this exit code."""


class JsonlTracker:
    """Appends one flushed JSON line per step to `path`, the source of truth of a run.

    On a resume after step k, records of later steps are dropped, because those steps run again. An incomplete last line
    (after a crash) is dropped too. Values that are not finite are written as null, so that every line is strict JSON.
    """

    run_id: str | None = None

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _rewrite(path, [r for r in read_jsonl(path) if resume_step is None or _step(r) <= resume_step])
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Values) -> None:
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
        """Nothing to do: the images are in the run folder already."""

    def alert(self, title: str, text: str) -> None:
        """Nothing to do: the values that led to it are in the line of the step."""

    def finish(self, exit_code: int) -> None:
        self._file.close()


class WandbTracker:
    """Logs to Weights & Biases: offline below the run folder, unless WANDB_MODE or WANDB_API_KEY is set.

    Every kind of failure is logged once as a warning. If wandb cannot start, `run_id` stays as given and calls do
    nothing.
    """

    def __init__(
        self,
        run_folder: Path,
        project: str,
        name: str,
        config: dict[str, Any],
        run_id: str | None = None,
        group: str | None = None,
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._guard = _Guard("wandb")
        self._guard("start", lambda: self._start(run_folder, project, name, config, group))

    def _start(self, run_folder: Path, project: str, name: str, config: dict[str, Any], group: str | None) -> None:
        import wandb  # takes a third of a second, and not every run needs it

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        run_folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=project,
            name=name,
            group=group,
            config=config,
            dir=str(run_folder),
            id=self.run_id,
            mode=mode,
            # Offline, a resumed run gets a second folder with the same id; the server joins them at `wandb sync`.
            resume="allow" if self.run_id and mode in ("online", "shared") else None,
            settings=wandb.Settings(silent=mode != "online", finish_timeout=300.0),
        )
        # wandb's built-in step can only increase, but a resumed run repeats steps: use our own as the x axis.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run, self.run_id = run, run.id

    def log(self, step: int, values: Values) -> None:
        if self._run is not None:
            self._guard("log", lambda: self._run.log({"step": step, **values}))

    def images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
        if self._run is not None:
            self._guard("images", lambda: self._log_images(step, name, paths, captions))

    def _log_images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
        import wandb

        images = [wandb.Image(str(path), caption=caption) for path, caption in zip(paths, captions, strict=True)]
        self._run.log({"step": step, name: images})

    def alert(self, title: str, text: str) -> None:
        if self._run is not None:
            self._guard("alert", lambda: self._run.alert(title=title, text=text, level="WARN"))

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None


class Trackers:
    """Several trackers as one. A failure of one does not affect the others."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self._guards = [_Guard(type(tracker).__name__) for tracker in self.trackers]

    @property
    def run_id(self) -> str | None:
        """The id of the first tracker that has one; checkpoints keep it."""
        return next((tracker.run_id for tracker in self.trackers if tracker.run_id is not None), None)

    def log(self, step: int, values: Values) -> None:
        self._each("log", lambda tracker: tracker.log(step, values))

    def images(self, step: int, name: str, paths: list[Path], captions: list[str]) -> None:
        self._each("images", lambda tracker: tracker.images(step, name, paths, captions))

    def alert(self, title: str, text: str) -> None:
        self._each("alert", lambda tracker: tracker.alert(title, text))

    def finish(self, exit_code: int) -> None:
        self._each("finish", lambda tracker: tracker.finish(exit_code))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker, guard in zip(self.trackers, self._guards, strict=True):
            guard(what, lambda tracker=tracker: call(tracker))  # type: ignore[misc]


def make_trackers(
    kind: str,
    run_folder: Path,
    config: dict[str, Any],
    resume_step: int | None = None,
    run_id: str | None = None,
    project: str = "emma",
    name: str | None = None,
    group: str | None = None,
) -> Trackers:
    """The trackers of a run: metrics.jsonl always, and W&B for `kind` "wandb".

    resume_step: step of the checkpoint that the run continues, 0 for a new run, None to keep every record.
    run_id: W&B's id of the run before a restart. name: shown by W&B, by default that of the run folder. group: name of
    the pipeline. Raises UserError for another kind.
    """
    if kind not in ("jsonl", "wandb"):
        raise UserError(f"tracker.kind: {kind!r} is not known; use jsonl or wandb")
    trackers: list[Tracker] = [JsonlTracker(run_folder / "metrics.jsonl", resume_step)]
    if kind == "wandb":
        trackers.append(WandbTracker(run_folder, project, name or run_folder.name, config, run_id, group))
    return Trackers(trackers)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file. Incomplete lines, as a killed run may leave at the end, are skipped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class _Guard:
    """Runs calls whose failure must not stop training. Logs the first failure of each kind of call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failed: set[str] = set()

    def __call__(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a tracker may raise anything
            if what not in self._failed:
                self._failed.add(what)
                log.warning("%s: %s failed (%s: %s); training goes on", self._name, what, type(error).__name__, error)


def _step(record: dict[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else math.inf


def _line(record: dict[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(_line(record).encode() for record in records)
