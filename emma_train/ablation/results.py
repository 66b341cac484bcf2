"""The results of an ablation: one line of JSON for each finished trial, added when it is finished."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emma_train.ablation.design import Trial
from emma_train.errors import RunError, UserError
from emma_train.monitor.goodput import read_ledger
from emma_train.monitor.run_state import STARTS_FILE
from emma_train.monitor.trackers import read_jsonl
from emma_train.storage.files import write_atomic

NOT_QUALITY = ("val/time_s", "val/forgotten")


@dataclass(frozen=True)
class TrialResult:
    """One arm with one seed."""

    arm: str
    seed: int
    commit: str
    """Of the code that trained it; + where files were changed."""
    recipe: str
    """Trial.recipe_hash."""
    parameters: int
    tokens: int
    """LLM tokens that were trained on, of all stages."""
    flops: float
    """Useful FLOPs of all steps, by the arithmetic of `emma-train plan` on the index of the data."""
    seconds: float
    """Wall time of the runs, all starts."""
    device: str
    metrics: dict[str, float]
    """val/... of the last step; SPLIT/TASK/METRIC of the evaluation."""


def read_results(path: Path) -> list[TrialResult]:
    """The lines of a file; none where there is no file. Raises UserError on a line that is no result, unless it is a
    last one that was cut off."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the results ({error}); name another file with --out") from None
    results, lines = [], text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            results.append(TrialResult(**json.loads(line)))
        except (ValueError, TypeError):
            is_cut_off = number == len(lines) and line.startswith("{") and not text.endswith("\n")
            if not is_cut_off:
                raise UserError(f"{path}:{number}: no result of an ablation; remove the line") from None
    return results


def append_result(path: Path, result: TrialResult) -> None:
    """Add a line; one before it that was cut off is removed. Raises RunError."""
    try:
        before = path.read_bytes() if path.exists() else b""
        complete = before[: before.rfind(b"\n") + 1]
        write_atomic(path, complete + json.dumps(asdict(result)).encode() + b"\n")
    except OSError as error:
        raise RunError(f"{path}: cannot add a result ({error.strerror})") from None


def without_result(trials: Sequence[Trial], results: Sequence[TrialResult], out: Path) -> list[Trial]:
    """The trials without a result. Raises UserError where a result is of another recipe than the trial."""
    by_trial = {(result.arm, result.seed): result for result in results}
    for trial in trials:
        result = by_trial.get((trial.arm.name, trial.seed))
        if result is not None and result.recipe != trial.recipe_hash:
            raise UserError(
                f"{out}: the line of {trial.name} is of another recipe ({result.recipe}, now {trial.recipe_hash}); "
                "remove the line, or name another file with --out"
            )
    return [trial for trial in trials if (trial.arm.name, trial.seed) not in by_trial]


def result_of(trial: Trial, flops: float) -> TrialResult:
    """The result of a trial whose run is complete. Raises RunError where its folder lacks something."""
    try:
        rows = read_jsonl(trial.run_folder / "metrics.jsonl")
        surroundings = json.loads((trial.run_folder / "environment.json").read_text(encoding="utf-8"))
        summary = json.loads((trial.run_folder / "summary.json").read_text(encoding="utf-8"))
        starts = read_jsonl(trial.run_folder / STARTS_FILE)
        metrics = _validation(rows)
        if trial.arm.options is not None:
            metrics |= _scores(json.loads(scores_file(trial).read_text(encoding="utf-8"))["scores"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise RunError(f"{trial.run_folder}: cannot read what came out ({error})") from None
    folders = [Path(recipe.run.root) / recipe.run.name for recipe in trial.stages]
    ledgers = [read_ledger(folder) for folder in folders]
    return TrialResult(
        arm=trial.arm.name,
        seed=trial.seed,
        commit=str(starts[-1].get("commit") or ""),
        recipe=trial.recipe_hash,
        parameters=int(summary["parameters"]),
        tokens=sum(_last(read_jsonl(folder / "metrics.jsonl"), "seen/tokens") for folder in folders),
        flops=flops,
        seconds=round(sum(ledger.wall_s for ledger in ledgers if ledger is not None), 1),
        device=str(surroundings["device"]),
        metrics=metrics,
    )


def scores_file(trial: Trial) -> Path:
    """Where the evaluation of a trial is written: arms may share a run and differ in their evaluation."""
    return trial.run_folder / f"scores-{trial.recipe_hash}.json"


def _validation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of each metric of validation."""
    values: dict[str, float] = {}
    for row in rows:
        values |= {key: value for key, value in row.items() if key.startswith("val/") and _is_finite(value)}
    return {key: value for key, value in values.items() if key not in NOT_QUALITY}


def _scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values = {f"{score['split']}/{score['task']}/{score['metric']}": score["value"] for score in scores}
    return {key: value for key, value in values.items() if _is_finite(value)}


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return next((int(row[key]) for row in reversed(rows) if key in row), 0)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
