"""AdamW: groups, and one step in closed form."""

import pytest
import torch

from emma_train.config.schema import OptimizerConfig
from emma_train.engine.adam_state import set_learning_rate
from emma_train.engine.muon import takes_muon
from emma_train.model.parameter_groups import group_of
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import STAGES
from emma_train.training.optimizer import make_optimizer
from tests.helpers import tiny_emma, tiny_model


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda s: s.name)
def test_what_learns_is_in_one_group_and_only_matrices_decay(stage) -> None:  # type: ignore[no-untyped-def]
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))
    freeze(model, stage.trainable)
    optimizer = make_optimizer(
        {n: p for n, p in model.named_parameters() if p.requires_grad}, OptimizerConfig(lr=1e-3, weight_decay=0.1)
    )
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    for group in optimizer.param_groups:
        assert group["params"]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_no_group_is_empty() -> None:
    optimizer = make_optimizer(dict(torch.nn.Linear(3, 2, bias=False).named_parameters()), OptimizerConfig(lr=1e-3))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_the_paper_has_no_decay_and_the_usual_moments() -> None:
    config = OptimizerConfig(lr=1.0)
    assert (config.betas, config.eps, config.weight_decay, config.max_grad_norm) == ([0.9, 0.999], 1e-8, 0.0, 1.0)


def test_three_steps_are_adamws() -> None:
    layer = torch.nn.Linear(3, 2)
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    optimizer = make_optimizer(dict(layer.named_parameters()), config)
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


def test_a_scale_of_one_half_is_half_the_learning_rate() -> None:
    lr, decay = 0.01, 0.1
    start = dict(tiny_emma().named_parameters())

    def after_steps(config: OptimizerConfig) -> dict[str, torch.Tensor]:
        parameters = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
        optimizer, rng = make_optimizer(parameters, config), torch.Generator().manual_seed(0)
        for step in (1, 2):
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=rng)
            set_learning_rate(optimizer, config.lr / step)
            optimizer.step()
        return {name: p.detach() for name, p in parameters.items()}

    scaled = after_steps(OptimizerConfig(lr=lr, weight_decay=decay, lr_scale={"vision": 0.5, "velocity_head": 3.0}))
    want = {scale: after_steps(OptimizerConfig(lr=scale * lr, weight_decay=decay)) for scale in (0.5, 1.0, 3.0)}
    for name in start:
        scale = {"vision": 0.5, "velocity_head": 3.0}.get(group_of(name), 1.0)
        torch.testing.assert_close(scaled[name], want[scale][name], rtol=0, atol=1e-7, msg=name)


def test_without_scales_the_groups_are_matrices_and_vectors() -> None:
    optimizer = make_optimizer(dict(tiny_emma().named_parameters()), OptimizerConfig(lr=1e-3))
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert [{p.ndim >= 2 for p in group["params"]} for group in optimizer.param_groups] == [{True}, {False}]
    set_learning_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda s: s.name)
def test_with_muon_each_trainable_parameter_takes_one_of_both_and_a_frozen_one_neither(stage) -> None:  # type: ignore[no-untyped-def]
    model = tiny_emma(tiny_model(vision={"stem_expert": True, "router": True}))
    freeze(model, stage.trainable)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    config = OptimizerConfig(lr=1e-3, kind="muon", weight_decay=0.1, lr_scale={"vision": 0.5})
    optimizer = make_optimizer(trainable, config)
    taken = {
        is_muon: [p for g in optimizer.param_groups if g["muon"] == is_muon for p in g["params"]]
        for is_muon in (True, False)
    }
    wanted = {name for name, p in trainable.items() if takes_muon(name, p.shape)}
    assert {id(p) for p in taken[True]} == {id(trainable[name]) for name in wanted}
    assert sorted(map(id, taken[True] + taken[False])) == sorted(map(id, trainable.values()))
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
        scales = {
            config.lr_scale.get(group_of(n), 1.0) for n, p in trainable.items() if any(p is q for q in group["params"])
        }
        assert scales == {group["lr_scale"]}
