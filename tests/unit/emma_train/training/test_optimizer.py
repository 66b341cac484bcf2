"""AdamW: groups, and one step in closed form."""

import pytest
import torch

from emma_train.config.schema import OptimizerConfig
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from emma_train.training.optimizer import make_optimizer
from tests.helpers import tiny_emma, tiny_model


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda s: s.name)
def test_what_learns_is_in_one_group_and_only_matrices_decay(stage) -> None:  # type: ignore[no-untyped-def]
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))
    freeze(model, stage.trainable)
    optimizer = make_optimizer(
        (p for p in model.parameters() if p.requires_grad), OptimizerConfig(lr=1e-3, weight_decay=0.1)
    )
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert group["params"]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_no_group_is_empty() -> None:
    optimizer = make_optimizer(torch.nn.Linear(3, 2, bias=False).parameters(), OptimizerConfig(lr=1e-3))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_the_paper_has_no_decay_and_the_usual_moments() -> None:
    config = OptimizerConfig(lr=1.0)
    assert (config.betas, config.eps, config.weight_decay, config.max_grad_norm) == ([0.9, 0.999], 1e-8, 0.0, 1.0)


def test_three_steps_are_adamws() -> None:
    layer = torch.nn.Linear(3, 2)
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    optimizer = make_optimizer(layer.parameters(), config)
    want = {n: p.detach().double().clone() for n, p in layer.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in want.items()}
    v = {n: torch.zeros_like(p) for n, p in want.items()}
    for step in (1, 2, 3):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            g = parameter.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            decay = 0.1 if name == "weight" else 0.0
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            want[name] = want[name] * (1 - 0.01 * decay) - 0.01 * update
        optimizer.step()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), want[name], rtol=0, atol=1e-6)
