"""Where metrics go: metrics.jsonl always, further trackers on request. A tracker that fails never stops training."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

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

    def samples(self, step: int, folder: Path) -> None:
        """Sample images and answers of one step, as generate/samples.py wrote them with a samples.json."""

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

    def samples(self, step: int, folder: Path) -> None:
        """Nothing to do: they are in the run folder already."""

    def alert(self, title: str, text: str) -> None:
        """Nothing to do: the values that led to it are in the line of the step."""

    def finish(self, exit_code: int) -> None:
        self._file.close()


class Trackers:
    """Several trackers as one. A failure of one does not affect the others."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self.seconds = 0.0
        """Time spent in calls of the trackers."""
        self._guards = [Guard(type(tracker).__name__) for tracker in self.trackers]

    @property
    def run_id(self) -> str | None:
        """The id of the first tracker that has one; checkpoints keep it."""
        return next((tracker.run_id for tracker in self.trackers if tracker.run_id is not None), None)

    def log(self, step: int, values: Values) -> None:
        self._each("log", lambda tracker: tracker.log(step, values))

    def samples(self, step: int, folder: Path) -> None:
        self._each("samples", lambda tracker: tracker.samples(step, folder))

    def alert(self, title: str, text: str) -> None:
        self._each("alert", lambda tracker: tracker.alert(title, text))

    def finish(self, exit_code: int) -> None:
        self._each("finish", lambda tracker: tracker.finish(exit_code))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        started = time.perf_counter()
        for tracker, guard in zip(self.trackers, self._guards, strict=True):
            guard(what, lambda tracker=tracker: call(tracker))  # type: ignore[misc]
        self.seconds += time.perf_counter() - started


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


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a step: task, prompt, and file, reference and target (names in the folder) or answer and truth."""
    listed = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return [entry for entry in listed if isinstance(entry, dict)]


class Guard:
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
