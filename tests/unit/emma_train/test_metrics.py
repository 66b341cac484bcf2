"""record_metric: running values of one rank, in a step that is logged and nowhere else."""

import math

import pytest
import torch

from emma_train.metrics import Reduce, not_recording, record_metric, recording
from emma_train.training.metric_reduction import HostMetric, to_host

CALLS = [torch.tensor([[1.0, 4.0]]), 2, torch.tensor(-3.0), torch.zeros(0)]


@pytest.mark.parametrize(
    ("reduce", "value", "num_values"), [("sum", 4, 4), ("mean", 4, 4), ("max", 4, 4), ("min", -3, 4)]
)
def test_every_element_of_every_call_counts(reduce: Reduce, value: float, num_values: int) -> None:
    with recording() as recorded:
        for values in CALLS:
            record_metric("m", values, reduce)
    assert to_host(recorded) == {"m": HostMetric(reduce, value, 4)}


def test_narrow_numbers_are_summed_in_wide_ones() -> None:
    with recording() as recorded:
        record_metric("bool", torch.ones(300, dtype=torch.bool), "sum")
        record_metric("int8", torch.full((300,), 100, dtype=torch.int8), "sum")
        record_metric("bfloat16", torch.ones(1000, dtype=torch.bfloat16), "sum")
        record_metric("number", 0.1, "sum")
    assert [metric.value for metric in to_host(recorded).values()] == [300, 30000, 1000, 0.1]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_a_value_that_is_not_a_number_stays(reduce: Reduce) -> None:
    with recording() as recorded:
        for value in (1.0, math.nan, 2.0):
            record_metric("m", torch.tensor(value), reduce)
    assert math.isnan(to_host(recorded)["m"].value)


def test_nothing_is_recorded_outside_of_a_logged_step() -> None:
    record_metric("m", 1.0, "sum")
    with recording(enabled=False) as recorded:
        record_metric("m", 1.0, "sum")
    assert recorded == {}
    with recording() as recorded:
        record_metric("m", 1.0, "sum")
        with not_recording():
            record_metric("m", 10.0, "sum")
        record_metric("m", 100.0, "sum")
    record_metric("m", 1000.0, "sum")
    assert to_host(recorded)["m"].value == 101.0


def test_a_graph_is_not_kept() -> None:
    with recording() as recorded:
        record_metric("m", torch.ones(2, requires_grad=True).exp(), "mean")
    assert not recorded["m"].value.requires_grad


def test_an_unknown_reduction_and_two_reductions_of_one_name_are_errors() -> None:
    with recording():
        with pytest.raises(ValueError, match="metric m: reduce is 'median'; use one of sum, mean, max, min"):
            record_metric("m", 1.0, "median")  # type: ignore[arg-type]
        record_metric("m", 1.0, "sum")
        with pytest.raises(ValueError, match="metric m is recorded with reduce='sum' and with reduce='max'"):
            record_metric("m", 1.0, "max")


def test_compiled_code_records_nothing() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        record_metric("m", x, "sum")
        return x + 1

    with recording() as recorded:
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert compiled(torch.ones(3)).sum() == 6
    assert recorded == {}
