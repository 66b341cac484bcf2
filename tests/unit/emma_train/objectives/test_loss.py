"""The loss account: how a step is cut into micro-batches does not change its gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from emma_train.config.schema import FlowConfig, LossConfig
from emma_train.model.emma import Emma
from emma_train.objectives.loss import FLOW_TASKS, TEXT_TASKS, Counts, LossAccumulator, count, losses
from emma_train.objectives.next_token import next_token_loss
from emma_train.sequence.pack import Sample, pack
from emma_train.sequence.tasks import TASKS
from emma_train.stages.stage import STAGES
from emma_train.training.forward import micro_loss
from tests.helpers import FakeAutoencoder, i2t_sample, it2i_sample, t2i_sample, tiny_emma, tiny_model

# Unequal on purpose: answers of 2 to some 20 tokens, images of 2 to 9 tokens.
SAMPLES = [
    i2t_sample("a", answer="a"),
    i2t_sample("b", [(1, 2)], answer="seven yellow fish in a very small round bowl"),
    t2i_sample("c", (3, 3)),
    it2i_sample("d", (1, 2), (1, 2)),
    i2t_sample("e", [], answer="two"),
    t2i_sample("f", (1, 2), text="a house"),
    it2i_sample("g", (2, 2), (2, 3)),
    i2t_sample("h", [(2, 2)], answer="no, never"),
]


def step(
    model: Emma, micro_batches: Sequence[Sequence[Sample]], stage: str = "stage1"
) -> tuple[dict[str, float], torch.Tensor]:
    """Logged values and the flat gradient of one optimizer step."""
    batches = [pack(samples) for samples in micro_batches]
    counts = count(batches, STAGES[stage].loss)
    accumulator = LossAccumulator(LossConfig(), counts, torch.device("cpu"))
    model.zero_grad()
    for batch in batches:
        micro_loss(model, FakeAutoencoder(), batch, FlowConfig(), STAGES[stage], accumulator).backward()
    gradient = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    return losses(accumulator.sums.tolist(), counts, LossConfig()), gradient


def cut(sizes: Sequence[int]) -> list[list[Sample]]:
    assert sum(sizes) == len(SAMPLES)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [SAMPLES[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [4, 4], [1, 5, 2], [1] * 8], ids=str)
def test_any_cut_of_the_step_has_one_gradient_and_one_loss(sizes: list[int]) -> None:
    model = tiny_emma()
    one_batch, want = step(model, [SAMPLES])
    values, got = step(model, cut(sizes))
    assert want.abs().max() > 0.05
    assert float((got - want).abs().max()) < 1e-6 * max(1.0, float(want.abs().max()))
    assert values.keys() == one_batch.keys() and all(
        values[k] == pytest.approx(one_batch[k], rel=1e-6) for k in one_batch
    )


def test_the_mean_of_means_would_be_another_gradient() -> None:
    # The claim has content: these micro-batches hold unequal numbers of tokens.
    counts = [count([pack(samples)], "tokens") for samples in cut([2, 2, 2, 2])]
    assert all(len({c.of(tasks) for c in counts}) > 2 for tasks in (TEXT_TASKS, FLOW_TASKS))


def test_ranks_that_share_the_micro_batches_sum_to_the_step() -> None:
    # Two ranks: each counts its own, the counts are summed, and so are the gradients.
    model, halves = tiny_emma(), cut([4, 4])
    _, want = step(model, [SAMPLES])
    counts = [count([pack(half)], "tokens") for half in halves]
    total = Counts({task: counts[0].of([task]) + counts[1].of([task]) for task in TASKS})
    model.zero_grad()
    for half in halves:
        accumulator = LossAccumulator(LossConfig(), total, torch.device("cpu"))
        micro_loss(model, FakeAutoencoder(), pack(half), FlowConfig(), STAGES["stage1"], accumulator).backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float((got - want).abs().max()) < 1e-6 * max(1.0, float(want.abs().max()))


def test_counts_are_those_of_the_tokens() -> None:
    counts = count([pack(samples) for samples in cut([3, 5])], "tokens")
    assert (counts.of(["t2i"]), counts.of(["it2i"]), counts.of(FLOW_TASKS)) == (9 + 2, 2 + 6, 19)
    assert counts.of(TEXT_TASKS) == sum(len(pack([s]).labels) for s in SAMPLES)
    images = [i2t_sample("x", [(1, 1), (1, 1)], stem=1), i2t_sample("y"), i2t_sample("z", stem=0)]
    assert count([pack(images)], "router").of(TEXT_TASKS) == 3


def logged(sums: list[float], counts: list[int], config: LossConfig) -> dict[str, float]:
    """`losses` of i2t, t2i and it2i; other tasks have nothing."""
    rest = [0.0] * (len(TASKS) - 3)
    return losses([*sums, *rest], Counts(dict(zip(TASKS, counts, strict=False))), config)


def test_losses_are_weighted_means_over_the_step() -> None:
    config = LossConfig(ce_weight=0.25, fm_weight=2.0)
    values = logged([8.0, 6.0, 10.0], [4, 3, 2], config)
    assert values == {"loss": 0.25 * 2.0 + 2.0 * 16 / 5, "loss/i2t": 2.0, "loss/t2i": 2.0, "loss/it2i": 5.0}
    assert logged([8.0, 0.0, 0.0], [4, 0, 0], config) == {"loss": 0.5, "loss/i2t": 2.0}
    assert logged([0.0, 6.0, 0.0], [0, 3, 0], config) == {"loss": 4.0, "loss/t2i": 2.0}
    assert logged([0.0, 0.0, 0.0], [0, 0, 0], config) == {"loss": 0.0}
    assert (LossConfig().ce_weight, LossConfig().fm_weight) == (0.25, 1.0)


def test_the_scalars_of_a_step_sum_to_its_logged_loss() -> None:
    counts, config = Counts({"i2t": 3, "t2i": 2, "it2i": 4}), LossConfig(0.5, 3.0)
    accumulator = LossAccumulator(config, counts, torch.device("cpu"))
    i2t, flow = torch.rand(3), torch.rand(6)
    edit = torch.tensor([True, False, True, True, False, True])
    names = list(TASKS)
    text_task, flow_task = torch.zeros(3), torch.where(edit, names.index("it2i"), names.index("t2i"))
    parts = [
        accumulator.add(i2t[rows], text_task[rows], flow[images], flow_task[images])
        for rows, images in ((slice(1), slice(4)), (slice(1, None), slice(4, None)))
    ]
    values = losses(accumulator.sums.tolist(), counts, config)
    assert float(sum(parts)) == pytest.approx(values["loss"], rel=1e-6)
    assert values["loss/it2i"] == pytest.approx(float(flow[edit].mean()), rel=1e-6)
    assert values["loss/t2i"] == pytest.approx(float(flow[~edit].mean()), rel=1e-6)


def test_a_loss_without_tokens_is_an_exact_zero_that_stays_in_the_graph() -> None:
    head = nn.Linear(4, 2)
    accumulator = LossAccumulator(LossConfig(), Counts(), torch.device("cpu"))
    empty = head(torch.zeros(0, 4)).sum(-1)
    loss = accumulator.add(empty, torch.zeros(0), empty, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and head.weight.grad is not None and not head.weight.grad.any()


def test_router_tuning_learns_from_labelled_images_alone() -> None:
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))
    known = [i2t_sample("a", stem=1), i2t_sample("b", [(1, 2)], stem=0)]
    values, want = step(model, [known], "stage4_router")
    more, got = step(model, [[*known, i2t_sample("c")]], "stage4_router")
    assert more["loss"] == pytest.approx(values["loss"], rel=1e-5) and float((got - want).abs().max()) < 1e-6
    moved = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "router" in moved and "stem_layers" not in moved


def test_next_token_loss_is_cross_entropy_per_token_in_float32() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
    want = torch.tensor([torch.tensor([2.0, 0, 0]).exp().sum().log() - 2.0, torch.tensor(3.0).log()])
    torch.testing.assert_close(next_token_loss(logits, labels), want)
    assert next_token_loss(logits.bfloat16(), labels).dtype == torch.float32
    assert next_token_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
