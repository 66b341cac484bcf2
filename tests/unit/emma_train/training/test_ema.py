"""Averaged weights in closed form, and swapping them in to the last bit."""

import pytest
import torch
from torch import nn

from emma_train.training.ema import Ema


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    return net


def learning(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.995, 0.9999])
def test_after_n_steps_it_is_the_geometric_mean_of_the_weights(decay: float) -> None:
    net, steps = model(), 200
    start = net[1].weight.detach().clone()
    ema, history = Ema(learning(net), decay), []
    for _ in range(steps):
        with torch.no_grad():
            net[1].weight += 0.1 * torch.randn_like(start)
        history.append(net[1].weight.detach().double())
        ema.update()
    want = decay**steps * start.double()
    for age, weight in enumerate(reversed(history)):
        want += (1 - decay) * decay**age * weight
    torch.testing.assert_close(ema.averages["1.weight"].double(), want, rtol=0, atol=2e-6)


def test_a_constant_weight_is_its_own_average() -> None:
    net = model()
    ema = Ema(learning(net), 0.995)
    for _ in range(50):
        ema.update()
    assert torch.equal(ema.averages["1.weight"], net[1].weight)


def test_frozen_weights_have_no_average_and_averages_are_copies() -> None:
    net = model()
    ema = Ema(learning(net), 0.9)
    assert set(ema.averages) == {"1.weight", "1.bias"}
    with torch.no_grad():
        net[1].weight.zero_()
    assert ema.averages["1.weight"].any() and not ema.averages["1.weight"].requires_grad


def test_swapping_in_restores_both_sides_bit_for_bit_even_after_an_error() -> None:
    net = model()
    ema = Ema(learning(net), 0.9)
    with torch.no_grad():
        net[1].weight += torch.randn_like(net[1].weight)
    ema.update()
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    averages = {n: a.clone() for n, a in ema.averages.items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, averages.get(name, weights[name]))
        raise RuntimeError("inside")
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    assert all(torch.equal(ema.averages[n], averages[n]) for n in averages)
    assert [p.data_ptr() for p in net.parameters()] == pointers
