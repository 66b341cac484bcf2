"""Counter-based draws: distribution, independence, and that a value never depends on its neighbours."""

import math

import numpy as np
import pytest
import torch

from emma_train.objectives import counter_rng
from emma_train.objectives.counter_rng import hashed, normal, uniform

NUM = 200_000


def column(seed: int, num: int = NUM) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([seed]), torch.arange(num)


def ks(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance times sqrt(n) of sorted values to their distribution."""
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    distance = torch.maximum((cdf - steps).abs(), (cdf - steps + 1 / len(values)).abs()).max()
    return float(distance) * math.sqrt(len(values))


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_normal_is_standard_normal(seed: int) -> None:
    values = normal(*column(seed)).double()
    assert values.dtype == torch.float64 and torch.isfinite(values).all()
    assert abs(float(values.mean())) < 4 / math.sqrt(NUM)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / NUM)
    assert abs(float((values**3).mean())) < 4 * math.sqrt(15 / NUM)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / NUM)
    ordered = values.sort().values
    assert ks(ordered, 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))) < 1.63  # 1 %


def test_uniform_is_uniform() -> None:
    values = uniform(*column(3)).double().sort().values
    assert ks(values, values) < 1.63 and values[0] > 0 and values[-1] < 1


@pytest.mark.parametrize("bits", [0, -1], ids=["all zero", "all one"])
def test_uniform_reaches_neither_end(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter_rng, "hashed", lambda seeds, counters: torch.full((1,), bits))
    value = counter_rng.uniform(torch.zeros(1), torch.zeros(1))
    assert value.dtype == torch.float32 and 0.0 < float(value) < 1.0
    # Gumbel noise of sampled text and Box-Muller both take logarithms of it.
    assert torch.isfinite(torch.log(-torch.log(value))).all()


def test_hash_is_splitmix64() -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for seed, counter in ((0, 0), (1, 2), (2**63 - 1, 10**9), (123456789012345678, 7)):
        want = mix((mix(seed) + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert int(hashed(torch.tensor(seed), torch.tensor(counter))) % 2**64 == want


def test_values_never_change() -> None:
    assert hashed(torch.tensor([0, 7]), torch.tensor([0, 3])).tolist() == [-2152535657050944081, -2154039811576856741]
    assert uniform(torch.tensor([0, 7]), torch.tensor([0, 3])).tolist() == [0.883310854434967, 0.8832293152809143]
    torch.testing.assert_close(
        normal(torch.tensor([0, 7]), torch.tensor([0, 3])), torch.tensor([-0.452758, -1.073459]), rtol=1e-5, atol=1e-6
    )


def test_a_value_does_not_depend_on_what_is_drawn_beside_it() -> None:
    seeds = torch.tensor([5, 9, 5, 2**61])
    table = normal(seeds[:, None], torch.arange(37))
    assert torch.equal(table[0], table[2])
    for row, seed in enumerate(seeds):
        assert torch.equal(table[row], normal(seed.view(1), torch.arange(37)))
        assert torch.equal(table[row, 20:21], normal(seed.view(1), torch.tensor([20])))
    order = torch.randperm(37)
    assert torch.equal(table[:, order], normal(seeds[:, None], order))


def test_seeds_and_neighbouring_counters_are_uncorrelated() -> None:
    # Consecutive seeds, seeds one bit apart, and one stream against itself shifted.
    seeds = torch.tensor([0, 1, 2, 3, 1 << 40, (1 << 40) + 1, 1 << 62])
    values = normal(seeds[:, None], torch.arange(20_000)).double().numpy()
    assert np.abs(np.corrcoef(values) - np.eye(len(seeds))).max() < 4.5 / math.sqrt(20_000)
    for lag in (1, 2, 32, 64):
        assert abs(np.corrcoef(values[0, :-lag], values[0, lag:])[0, 1]) < 4.5 / math.sqrt(20_000)
    assert abs(np.corrcoef(values[0] ** 2, values[1] ** 2)[0, 1]) < 4.5 / math.sqrt(20_000)


def test_no_value_comes_twice() -> None:
    assert len(torch.unique(hashed(torch.arange(1000)[:, None], torch.arange(1000)))) == 1_000_000
