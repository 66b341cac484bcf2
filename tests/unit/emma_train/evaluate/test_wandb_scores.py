"""Scores in W&B, read back from the file of an offline run."""

import json
from pathlib import Path

import numpy as np
import pytest

from emma_train.config.schema import TrackerConfig
from emma_train.errors import RunError
from emma_train.evaluate.wandb_scores import ITEM_COLUMNS, SCORE_COLUMNS, send_scores
from emma_train.generate.items import EvaluationItem
from emma_train.monitor.wandb_tracker import WandbTracker
from tests.helpers import tiny_recipe
from tests.wandb_file import history, wandb_runs

wandb = pytest.importorskip("wandb")
SCORE = {"split": "heldout", "name": "answer: group", "value": 0.65, "stderr": 0.03, "num": 96, "baseline": None}


def items() -> list[EvaluationItem]:
    answer = EvaluationItem(
        "heldout", "i2t", "group", "a/0", "which group?", 1, {"exact_match": True}, "fruit", "fruit"
    )
    image = EvaluationItem("heldout", "t2i", "scene", "b", "a dog", 2, {"object": False, "style": True}, "a cat")
    image.image = np.zeros((8, 8, 3), np.uint8)
    return [answer, image]


@pytest.mark.seconds
def test_scores_join_the_run_that_trained_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained = WandbTracker(tmp_path / "train", "stage3", {}, TrackerConfig())
    trained.finish(0)
    meta = {"step": 200, "tracker_run": trained.run_id}
    send_scores(tmp_path, "scores", tiny_recipe("stage3"), meta, [{**SCORE, "unit": "share"}], items())
    records = wandb_runs(tmp_path, ended=1)
    assert {r.run.run_id for r in records if r.HasField("run")} == {trained.run_id}
    (row,) = history(records)
    assert row["step"] == 200
    assert row["eval/heldout/answer: group"] == 0.65
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")]
    by_columns = {tuple(table["columns"]): table["data"] for table in tables}
    assert by_columns[SCORE_COLUMNS] == [["heldout", "answer: group", 0.65, 0.03, 96, None, "share"]]
    drawn, answered = by_columns[ITEM_COLUMNS]
    assert drawn[4] == "Image"  # its pixels are in the artifact of the table
    assert drawn[5:] == ["a cat", "", "object"]
    assert answered[3:] == ["which group?", None, "fruit", "fruit", ""]


def test_wandb_that_cannot_start_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(RunError, match="--wandb: wandb could not start"):
        send_scores(tmp_path, "scores", tiny_recipe("stage3"), {"step": 1}, [{**SCORE, "unit": "share"}])
