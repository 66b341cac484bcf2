"""A run folder as the report reads it: metrics, summary, environment, config, scores and samples."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emma_train.monitor.goodput import Ledger, read_ledger
from emma_train.monitor.run_state import STARTS_FILE
from emma_train.monitor.trackers import read_jsonl
from emma_train.report.gallery import SampleSnapshot, read_snapshots
from emma_train.report.numbers import as_number


@dataclass
class StageRun:
    """What a run folder holds. records: metrics in the order of steps, one per step. config: text of config.yaml."""

    name: str
    folder: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: str
    scores: list[dict[str, Any]]
    snapshots: list[SampleSnapshot] = field(default_factory=list)
    ledger: Ledger | None = None
    """Where the time of all starts went; None for runs of version 0.1.0."""
    starts: list[tuple[int, int]] = field(default_factory=list)
    """Of each start the step that was done before, and the number of ranks."""

    @property
    def label(self) -> str:
        """ "stage4_expert" -> "Stage 4 · expert"."""
        match = re.fullmatch(r"stage(\d+)_?(.*)", self.name)
        if not match:
            return self.name.replace("_", " ")
        return f"Stage {match[1]}" + (f" · {match[2].replace('_', ' ')}" if match[2] else "")

    @property
    def short(self) -> str:
        """ "stage2_phase3" -> "S2p3"."""
        match = re.fullmatch(r"stage(\d+)_?(.*)", self.name)
        if not match:
            return self.name[:3]
        return f"S{match[1]}" + match[2][:1] + "".join(c for c in match[2] if c.isdigit())

    @property
    def steps(self) -> int:
        """Number of steps: of the last record or of the summary, whichever is larger."""
        logged = self.records[-1]["step"] if self.records else 0
        return int(max(logged, as_number(self.summary.get("steps")) or 0))

    @property
    def seconds(self) -> float | None:
        """Duration: by the ledger from the beginning of the first start to the last step, else the time of the logged
        steps, that of the summary, or that between the first and the last record."""
        if self.ledger is not None:
            return self.ledger.wall_s
        if (split := self.time_split()) is not None:
            return sum(split)
        seconds = as_number(self.summary.get("seconds"))
        times = [t for t in (as_number(r.get("time_unix")) for r in self.records) if t is not None]
        if seconds is not None:
            return seconds
        return times[-1] - times[0] if len(times) > 1 else None

    def time_split(self) -> tuple[float, float, float] | None:
        """Seconds in computing, waiting for data and checkpoints, by the metrics; None where no step time was logged.

        `step_s` includes the wait for data; the stall of a checkpoint comes on top. If only some steps are logged, a
        record counts for all steps since the record before; a stall counts once.
        """
        step, wait, stall = (np.nan_to_num(self.values(key)) for key in ("step_s", "data/wait_s", "checkpoint/stall_s"))
        if not step.any():
            return None
        weight = np.diff([0.0, *(record["step"] for record in self.records)])
        waited = float(weight @ wait)
        return max(0.0, float(weight @ step) - waited), waited, float(stall.sum())

    def values(self, key: str) -> np.ndarray:
        """A metric: (num_records,), NaN where it is absent or not a finite number."""
        numbers = (as_number(record.get(key)) for record in self.records)
        return np.array([math.nan if n is None or not math.isfinite(n) else n for n in numbers], dtype=float)


def stage_folders(run: Path) -> list[Path]:
    """The run folder itself, or the run folders of stages in it, in the order of their names and so of the pipeline."""
    if (run / "metrics.jsonl").exists():
        return [run]
    below = [
        f
        for f in run.iterdir()
        if f.is_dir() and any((f / n).exists() for n in ("metrics.jsonl", "config.yaml", "summary.json"))
    ]
    if not below and (run / "config.yaml").exists():
        return [run]
    return sorted(below, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name)])


def first_stages(folders: list[Path]) -> list[str]:
    """Names of the run folders that do not start from another one of them: one for the stages of a pipeline, more for
    runs that only lie side by side. A folder without a config is taken for a stage of the others."""
    names = {folder.name for folder in folders}
    starts = []
    for folder in folders:
        try:
            source = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["init"]["from"]
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
        if not source or Path(str(source)).name not in names - {folder.name}:
            starts.append(folder.name)
    return starts


def read_stage_run(folder: Path, missing: list[str]) -> StageRun:
    """Read a run folder. Adds a line to `missing` for each thing that it lacks."""
    records: list[dict[str, Any]] = []
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        # After a resume, the later record of a step counts.
        by_step = {r["step"]: r for r in read_jsonl(metrics) if as_number(r.get("step")) is not None}
        records = [by_step[step] for step in sorted(by_step)]
    if not records:
        missing.append(f"{folder.name}: metrics.jsonl is missing or empty")
    for name in ("config.yaml", "environment.json", "summary.json"):
        if not (folder / name).exists():
            missing.append(f"{folder.name}: {name} is missing")
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = ""
    summary = read_object(folder / "summary.json")
    logged_name = next((r["stage"] for r in records if isinstance(r.get("stage"), str)), None)
    name = folder.name if re.match(r"stage\d", folder.name) else str(summary.get("stage") or logged_name or folder.name)
    stage = StageRun(
        name,
        folder,
        records,
        summary,
        read_object(folder / "environment.json"),
        config,
        read_scores(folder, missing),
    )
    stage.snapshots = read_snapshots(stage.label, stage.short, folder, missing)
    stage.ledger, stage.starts = read_ledger(folder), read_starts(folder)
    return stage


def read_starts(folder: Path) -> list[tuple[int, int]]:
    """Step and number of ranks of each start; starts without them are left out."""
    path = folder / STARTS_FILE
    lines = read_jsonl(path) if path.is_file() else []
    pairs = [(as_number(line.get("step")), as_number(line.get("world_size"))) for line in lines]
    return [(int(step), int(size)) for step, size in pairs if step is not None and size is not None]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is missing, torn or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def read_scores(folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The scores that `evaluate` wrote into a folder; none if there is no scores.json."""
    path = folder / "scores.json"
    if not path.exists():
        return []
    scores = read_object(path).get("scores")
    if not isinstance(scores, list):
        missing.append(f"{folder.name}: scores.json has no list named scores")
        return []
    return [score for score in scores if isinstance(score, dict)]
