"""Losses by source: weighted by their tokens they are the loss of the task."""

import pytest
import torch

from emma_train.metrics import recording
from emma_train.training.metric_reduction import over_ranks, to_host
from emma_train.training.source_losses import pop_source_losses, record_source_losses
from emma_train.training.step_metrics import RankUsage, pop_group_norms, rank_metrics


def reduced(*ranks: dict) -> dict[str, float]:
    hosts = [to_host(recorded) for recorded in ranks]
    names = dict.fromkeys(name for host in hosts for name in host)
    values = {name: over_ranks(name, [host[name] for host in hosts if name in host], sp_size=1) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def test_closed_form_over_micro_batches_and_ranks() -> None:
    with recording() as one:
        losses = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
        record_source_losses(["i2t", "t2i", "i2t"], ["a", "", "b"], torch.tensor([0, 0, 2, 1]), losses)
        record_source_losses(["i2t"], ["a"], torch.tensor([0]), torch.tensor([6.0]))
    with recording() as other:
        record_source_losses(["i2t", "i2t"], ["b", "x/c"], torch.tensor([0, 0]), torch.tensor([5.0, 7.0]))
    values = reduced(one, other) | {"other": 1.0}
    assert pop_source_losses(values) == {"loss/i2t/a": (1 + 2 + 6) / 3, "loss/i2t/b": (3 + 5 + 7) / 3}
    assert values == {"other": 1.0}  # x/c had a sample without tokens


def test_weighted_by_their_tokens_they_are_the_loss_of_the_task() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(1000, generator=generator)
    owner = torch.randint(0, 7, (1000,), generator=generator)
    sources = [f"source{index % 3}" for index in range(7)]
    with recording() as recorded:
        record_source_losses(["t2i"] * 7, sources, owner, losses)
    values = reduced(recorded)
    counts = {name.removeprefix("source_num_tokens/"): v for name, v in values.items() if "num_tokens" in name}
    means = pop_source_losses(values)
    assert sum(counts.values()) == 1000
    mean = sum(counts[name.removeprefix("loss/")] * value for name, value in means.items()) / 1000
    assert mean == pytest.approx(float(losses.double().mean()), rel=1e-12)


def test_nothing_is_computed_where_nothing_is_recorded_or_told_apart() -> None:
    record_source_losses(["i2t"], ["a"], None, None)  # type: ignore[arg-type]
    with recording() as recorded:
        record_source_losses(["i2t"], [""], None, None)  # type: ignore[arg-type]
        record_source_losses([], [], None, None)  # type: ignore[arg-type]
    assert not recorded


def test_the_slowest_rank() -> None:
    ranks = [RankUsage(1.0, 5.0), RankUsage(4.0, 2.0), RankUsage(1.0, 9.0)]
    assert rank_metrics(ranks) == {
        "ranks/step_s_mean": 2.0,
        "ranks/step_s_max": 4.0,
        "ranks/slowest": 1,
        "ranks/slowest_memory_gib": 2.0,
    }


def test_norms_of_groups_are_roots() -> None:
    values = {"grad_square/vision": 9.0, "grad_square/decoder": 16.0, "x": 1.0}
    assert pop_group_norms(values) == {"grad_norm/vision": 3.0, "grad_norm/decoder": 4.0}
    assert values == {"x": 1.0}
