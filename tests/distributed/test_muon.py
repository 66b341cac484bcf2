"""Muon under every engine: equal to a plain reference on one process, and resumed on other numbers of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emma_train.model.initial import start_value
from tests.distributed.muon_ranks import reference_steps, steps_of_ways
from tests.distributed.spawn import run_ranks
from tests.helpers import recipe_values, tiny_recipe, write_recipe
from tests.runs import checkpoint, differences, learnt, stored, train, train_until

STEPS = 20
MUON: dict[str, Any] = {
    "optimizer__kind": "muon",
    "optimizer__muon__dtype": "fp32",
    "optimizer__lr": 5e-5,
    "optimizer__weight_decay": 0.01,
    "model__decoder__num_layers": 2,
    "model__decoder__num_shared_layers": 1,
}
ZERO = {"engine__kind": "deepspeed"}
ON_FOUR: dict[str, dict[str, Any]] = {
    "FSDP": {},
    "HSDP 2 x 2": {"engine__replicate": 2},
    "2 ranks a pack": {"engine__sequence_parallel": 2},
    **{f"ZeRO-{n}": {**ZERO, "engine__zero_stage": n} for n in (1, 2, 3)},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "FSDP, host memory": {"engine__offload_optimizer": True},
    "ZeRO-2": ON_FOUR["ZeRO-2"],
}


def distance(one: dict[str, Tensor], other: dict[str, Tensor], names: list[str]) -> float:
    """Norm of the difference over the norm."""
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in names)
    return (apart / sum(float(one[name].double().square().sum()) for name in names)) ** 0.5


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    result: dict[str, Tensor] = run_ranks(1, reference_steps, MUON, STEPS)[0].value
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "ways"), [(1, {"FSDP": {}}), (2, ON_TWO), (4, ON_FOUR)], ids=["1", "2", "4"])
def test_twenty_steps_are_those_of_a_plain_optimizer(
    reference: dict[str, Tensor], ranks: int, ways: dict[str, dict[str, Any]], record_property: Any
) -> None:
    weights = [name for name in reference if name.endswith((".weight", ".bias", ".placeholder"))]
    momenta = [name for name in reference if name.endswith(".momentum_buffer")]
    assert len(momenta) > 40
    overrides = [{**MUON, **way} for way in ways.values()]
    outcomes = run_ranks(ranks, steps_of_ways, overrides, STEPS, timeout_s=280)
    for way, result in zip(ways, outcomes[0].value, strict=True):
        assert {name for name in result if not name.endswith(".step")} == reference.keys(), way
        apart = distance(reference, result, weights), distance(reference, result, momenta)
        print(f"\n{way} on {ranks}: weights {apart[0]:.1e}, momenta {apart[1]:.1e}")
        record_property(f"{way} on {ranks}", apart)
        assert apart[0] <= 1e-6, way
        assert apart[1] <= 1e-5, way
    for other in outcomes[1:]:
        for one, same in zip(outcomes[0].value, other.value, strict=True):
            assert all(torch.equal(one[name], same[name]) for name in one)


CHAIN = {
    **MUON,
    "ema__decay": 0.9,
    "data__slots": 12,
    "data__samples_per_step": 36,
    "train__steps": 4,
    "train__save_every": 1000,
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four steps, beside its run `straight` on two ranks."""
    root = tmp_path_factory.mktemp("chain")
    recipe = write_recipe(root / "recipe.yaml", recipe_values("stage1", run__root=str(root), **CHAIN))
    train(recipe, "run.name=straight", processes=2)
    return recipe


@pytest.mark.slow
def test_a_resume_on_as_many_ranks_changes_no_bit(chain: Path) -> None:
    train_until(chain, 2, "run.name=twice", processes=2)
    train(chain, "run.name=twice", processes=2)
    straight, twice = chain.parent / "straight", chain.parent / "twice"
    assert learnt(twice) == learnt(straight)
    assert differences(stored(checkpoint(twice, 4)), stored(checkpoint(straight, 4))) == []


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_other_engines_and_numbers_of_ranks(chain: Path) -> None:
    """4 -> 2 -> 3 -> 1 ranks and another engine at each step, on the same data."""
    zero = "engine.kind=deepspeed"
    legs = [(4, "engine.replicate=2"), (2, zero, "engine.zero_stage=3"), (3, zero, "engine.zero_stage=1"), (1,)]
    for step, (processes, *overrides) in enumerate(legs, start=1):
        train(chain, "run.name=legs", f"train.steps={step}", *map(str, overrides), processes=int(processes))
    straight, legs_run = chain.parent / "straight", chain.parent / "legs"
    assert [line["data/digest"] for line in learnt(legs_run)] == [line["data/digest"] for line in learnt(straight)]
    expected, state = (stored(checkpoint(folder, 4)) for folder in (straight, legs_run))
    assert state.keys() == expected.keys()
    for kind in ("model.", "ema.", "optimizer."):
        names = [name for name in expected if name.startswith(kind) and not name.endswith(".step")]
        assert distance(expected, state, names) <= 1e-5, kind
    assert any(name.endswith(".momentum_buffer") for name in expected)


@pytest.mark.slow
def test_a_resume_with_the_other_optimizer_is_refused_in_one_line(chain: Path) -> None:
    for outcome in train(chain, "run.name=straight", "train.steps=5", "optimizer.kind=adamw", processes=2, code=2):
        assert "optimizer.kind is 'adamw' in the recipe and 'muon' in the checkpoint" in outcome.error_lines[-1]


@pytest.mark.slow
def test_matrices_without_a_gradient_stay(tmp_path: Path) -> None:
    """Stage 0 does not run the Gen branch: where the decoder trains, its Gen matrices get no gradient."""
    settings = {**MUON, "optimizer__weight_decay": 0.0, "train__steps": 2, "run__root": str(tmp_path)}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values("stage0", **settings))
    train(recipe, "stage.trainable=[decoder, und_adapter]", processes=2)
    model = tiny_recipe("stage0", **settings).model
    for name, weight in stored(checkpoint(tmp_path / "test-stage0", 2)).items():
        if name.startswith("model.") and name.endswith("_proj.weight") and "vision" not in name:
            start = start_value(name.removeprefix("model."), weight.shape, model)
            assert torch.equal(weight, start) == (".gen." in name), name
