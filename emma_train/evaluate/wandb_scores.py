"""Scores under eval/ of the W&B run that trained the model: a value each, and tables of scores and items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.config.load import to_stored
from emma_train.config.schema import Recipe
from emma_train.errors import RunError
from emma_train.generate.items import EvaluationItem
from emma_train.monitor.trackers import Values
from emma_train.monitor.wandb_tracker import LoggedTable, WandbTracker

SCORE_COLUMNS = ("split", "name", "value", "stderr", "num", "baseline", "unit")
ITEM_COLUMNS = ("split", "task", "kind", "prompt", "image", "output", "truth", "wrong")
MAX_ITEMS = 1_000
"""Rows of the table of items; those with an image come first."""


def send_scores(
    folder: Path,
    name: str,
    recipe: Recipe,
    meta: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]],
    items: Sequence[EvaluationItem] = (),
) -> None:
    """Send scores to the run of `meta`, or to a new one called `name` where the model was trained without W&B.

    folder: where an offline run is kept, in its subfolder wandb. Raises RunError where wandb cannot start.
    """
    tracker = WandbTracker(folder, name, to_stored(recipe), recipe.tracker, meta.get("tracker_run"))
    if not tracker.is_open:
        raise RunError("--wandb: wandb could not start, for the reason above; the scores are in files all the same")
    values: Values = {f"eval/{score['split']}/{score['name']}": float(score["value"]) for score in scores}
    tables: dict[str, LoggedTable] = {
        "eval/scores": (SCORE_COLUMNS, [[score[column] for column in SCORE_COLUMNS] for score in scores])
    }
    if items:
        shown = sorted(items, key=lambda item: item.image is None)[:MAX_ITEMS]
        tables["eval/items"] = (ITEM_COLUMNS, [_row(item) for item in shown])
    tracker.log_tables(int(meta["step"]), values, tables)
    tracker.finish(0)


def _row(item: EvaluationItem) -> list[Any]:
    wrong = ", ".join(metric for metric, right in item.verdicts.items() if not right)
    return [item.split, item.task, item.kind, item.prompt, item.image, item.output, item.truth, wrong]
