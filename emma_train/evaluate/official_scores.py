"""Official statistics as rows of results, with the answers that could not be read counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.generate.items import cluster_stderr


@dataclass
class OfficialScores:
    """What a scorer's files say about a benchmark.

    A missing answer, or one that cannot be read, is a failure: it counts as the lowest score and never as a guess.
    Without failures the numbers are the official ones.
    """

    split: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    by_item: dict[str, float] = field(default_factory=dict)
    """The score of each item, by its name."""
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the official arithmetic does and a reader may not expect."""

    def add_mean(self, name: str, metric: str, values: Sequence[tuple[str, float]], unit: str) -> dict[str, Any]:
        """A row with the mean of values, each with the name of its item: values of one item are not independent."""
        numbers = [value for _, value in values]
        mean, stderr = sum(numbers) / len(numbers), cluster_stderr(numbers, [item for item, _ in values])
        return self.add(name, metric, mean, stderr, len(values), unit)

    def add_mean_of(self, name: str, metric: str, rows: Sequence[dict[str, Any]], unit: str) -> dict[str, Any]:
        """A row with the mean of other rows, each counted once."""
        return self.add_weighted(name, metric, rows, [1 / len(rows)] * len(rows), unit)

    def add_weighted(
        self, name: str, metric: str, rows: Sequence[dict[str, Any]], weights: Sequence[float], unit: str
    ) -> dict[str, Any]:
        value = sum(weight * row["value"] for row, weight in zip(rows, weights, strict=True))
        stderr = sum((weight * row["stderr"]) ** 2 for row, weight in zip(rows, weights, strict=True)) ** 0.5
        return self.add(name, metric, value, stderr, sum(row["num"] for row in rows), unit)

    def add(self, name: str, metric: str, value: float, stderr: float, num: int, unit: str) -> dict[str, Any]:
        numbers = {"value": value, "stderr": stderr, "num": num, "baseline": None, "bar": None}
        task = name.replace(" ", "_")
        label = {"name": f"{name}: {metric}", "split": self.split, "task": task, "metric": metric.replace(" ", "_")}
        self.rows.append({**label, **numbers, "unit": unit, "higher_is_better": True})
        return self.rows[-1]

    def fail(self, item: str, reason: str) -> None:
        self.failures.append(f"{item}: {reason}")


ScoreFiles = Callable[[Sequence[BenchmarkItem], Sequence[Path], Path], OfficialScores]
"""(items that are expected, the scorer's files, folder with the official files) -> scores. Raises UserError."""


def one_file(paths: Sequence[Path], name: str) -> Path:
    """The scorer's file: what --score names, or `name` in the folder that it names. Raises UserError."""
    if len(paths) != 1:
        raise UserError(f"--score: names {len(paths)} files; give the one that the scorer wrote ({name})")
    path = paths[0] / name if paths[0].is_dir() else paths[0]
    if not path.is_file():
        raise UserError(f"--score {path}: does not exist; give the file that the official scorer wrote ({name})")
    return path


def number_in(value: Any, low: float, high: float) -> float | None:
    """A number within bounds, perhaps as text; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if low <= number <= high else None
