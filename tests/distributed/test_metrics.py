"""Recorded metrics over ranks, against closed forms."""

import pytest
import torch
import torch.distributed as dist

from emma_train.engine.world import join, share_packs
from emma_train.metrics import record_metric, recording
from emma_train.training.metric_reduction import reduce_metrics
from tests.distributed.spawn import run_ranks


def recorded_on_ranks(sp_size: int) -> tuple[dict[str, float], int]:
    """Reduced metrics, and the number of gathers that they took."""
    num_gathers, gather = 0, dist.all_gather_object

    def counted(*arguments: object, **options: object) -> None:
        nonlocal num_gathers
        num_gathers += 1
        gather(*arguments, **options)  # type: ignore[arg-type]

    with join("cpu", 60) as world:
        pack = world.rank // sp_size  # ranks that share a pack record the same
        with recording() as recorded:
            for micro_batch in range(pack + 1):
                values = torch.arange(1.0, 4.0 + micro_batch)
                for reduce in ("sum", "mean", "max", "min"):
                    record_metric(f"values/{reduce}", values * (-1) ** pack, reduce)  # type: ignore[arg-type]
            if world.rank == world.size - 1:
                record_metric("last/mean", 7, "mean")
                record_metric("last/sum", 7, "sum")
            record_metric("empty/mean", torch.zeros(0), "mean")
        dist.all_gather_object = counted
        reduced, ranks = reduce_metrics(recorded, share_packs(world, sp_size), lambda: world.rank)
        assert ranks == list(range(world.size))
        return reduced, num_gathers


@pytest.mark.parametrize(("size", "sp_size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_metrics_are_reduced_over_calls_and_ranks_in_one_gather(size: int, sp_size: int) -> None:
    by_pack = [[1, 2, 3], [-1, -2, -3, -1, -2, -3, -4]][: size // sp_size]
    values = [value for of_pack in by_pack for value in of_pack]
    expected = {
        "values/sum": sum(values),
        "values/mean": sum(values) / len(values),
        "values/max": 3,
        "values/min": min(values),
        "last/mean": 7,
        "last/sum": 7 / sp_size,
    }
    for outcome in run_ranks(size, recorded_on_ranks, sp_size):
        reduced, num_gathers = outcome.value
        assert reduced == expected
        assert num_gathers == 1


def recorded_differently() -> str:
    with join("cpu", 60) as world:
        with recording() as recorded:
            record_metric("m", 1.0, "sum" if world.is_main else "mean")
        try:
            reduce_metrics(recorded, world, lambda: None)
        except ValueError as error:
            return str(error)
        return ""


def test_one_name_with_two_reductions_is_an_error_on_every_rank() -> None:
    for outcome in run_ranks(2, recorded_differently):
        assert outcome.value == "metric m is recorded with reduce=mean and reduce=sum on different ranks"
