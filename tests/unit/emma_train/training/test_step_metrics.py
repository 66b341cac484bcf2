"""The line of a logged step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emma_train.config.mix import TASK_NAMES
from emma_train.metrics import Recorded, record_metric, recording
from emma_train.sequence.step_batches import StepBatches
from emma_train.stages.stage import stage_of
from emma_train.training.step_metrics import LOSS_SUM, StepMetrics
from emma_train.training.step_totals import StepTotals
from emma_train.training.train_state import TrainState
from tests.helpers import tiny_recipe

WORLD = SimpleNamespace(rank=0, gather=lambda value: [value], sp_size=1, device=torch.device("cpu"))


def line(recorded: Recorded) -> dict[str, Any]:
    recipe = tiny_recipe()
    counts = dict.fromkeys(TASK_NAMES, 0)
    totals = StepTotals(counts | {"i2t": 4}, counts | {"i2t": 2}, 50, 0, 0, 0, 0, 0, 0, 0)
    data = StepBatches(3, [], "digest", 1.5, [], wait_s=0.25, filled=0.9, epoch=1.25)
    metrics = StepMetrics(recipe, stage_of(recipe), WORLD)  # type: ignore[arg-type]
    return metrics.line(data, totals, TrainState(dropped_samples=7), recorded, lr=0.1, grad_norm=2.0, started=0.0)


def loss_sums() -> Recorded:
    with recording() as recorded:
        for task in TASK_NAMES:
            record_metric(f"{LOSS_SUM}{task}", 8.0 if task == "i2t" else 0.0, "sum")
    return recorded


def test_recorded_metrics_stand_beside_those_of_the_loop() -> None:
    with recording() as more:
        record_metric("router/entropy", torch.tensor([1.0, 2.0]), "mean")
        record_metric("router/empty", torch.zeros(0), "mean")
    values = line(loss_sums() | more)
    assert values["router/entropy"] == 1.5 and "router/empty" not in values
    assert values["loss/i2t"] == 2.0 and "loss/t2i" not in values
    assert not [name for name in values if name.startswith(LOSS_SUM)]
    assert (values["samples/i2t"], values["tokens/total"], values["data/skipped"]) == (2, 50, 7)
    assert (values["data/epoch"], values["data/digest"]) == (1.25, "digest")


def test_a_name_that_the_loop_logs_is_an_error() -> None:
    with recording() as more:
        record_metric("lr", 1.0, "mean")
    with pytest.raises(ValueError, match="record_metric: lr is logged by the loop; use another name"):
        line(loss_sums() | more)
