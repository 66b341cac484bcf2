"""stage.trainable and optimizer.lr_scale under every engine."""

from pathlib import Path

import pytest
import torch

from emma_train.model.initial import initial_value
from emma_train.model.parameter_groups import group_of
from tests.distributed.engines import REFERENCE, WAYS, Way, run, stage_recipe
from tests.runs import checkpoint, differences, learnt, stored, train, train_until

SCALES = {"vision": 0.5, "decoder": 0.25}
ENGINES = [way for way in (REFERENCE, *WAYS) if way.name in ("1 x 4", "2 x 2") or way.name.startswith("ZeRO")]


def initial(name: str, weight: torch.Tensor) -> torch.Tensor:
    return initial_value(name, weight.shape, 0, 3 if name.startswith("vision.") else 4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A recipe of one step, and the weights after it with one learning rate for all."""
    recipe = stage_recipe(tmp_path_factory.mktemp("scales"), "stage1", None, 1)
    return recipe, stored(checkpoint(run(recipe, REFERENCE, "plain"), 1))


@pytest.mark.parametrize("way", ENGINES, ids=lambda way: way.name)
def test_a_step_of_a_group_is_scaled(plain: tuple[Path, dict[str, torch.Tensor]], way: Way) -> None:
    """One step of AdamW is linear in the learning rate, weight decay included."""
    recipe, unscaled = plain
    scales = ",".join(f"{group}: {scale}" for group, scale in SCALES.items())
    folder = run(recipe, way, f"scaled {way.name}", f"optimizer.lr_scale={{{scales}}}")
    scaled = stored(checkpoint(folder, 1))
    for name in (name for name in scaled if name.startswith("model.")):
        parameter = name.removeprefix("model.")
        start = initial(parameter, scaled[name])
        want = start + SCALES.get(group_of(parameter), 1.0) * (unscaled[name] - start)
        # A step is 1e-3; where a gradient is all but zero, its sign may differ from engine to engine.
        assert (scaled[name] - want).abs().mean() < 2e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in ENGINES if way.processes == 2], ids=lambda way: way.name)
def test_a_run_with_scales_goes_on_bit_for_bit(tmp_path: Path, way: Way) -> None:
    recipe = stage_recipe(tmp_path, "stage1", None, 3, optimizer__lr_scale=SCALES)
    straight = run(recipe, way, "straight")
    train_until(recipe, 1, "run.name=twice", *way.overrides, processes=2)
    twice = run(recipe, way, "twice")
    assert learnt(twice) == learnt(straight)
    assert differences(stored(checkpoint(twice, 3)), stored(checkpoint(straight, 3))) == []


@pytest.mark.parametrize("way", ENGINES, ids=lambda way: way.name)
def test_stage_0_may_train_the_decoder_too(tmp_path: Path, way: Way) -> None:
    """Its Gen branch gets no gradient and does not move."""
    recipe = stage_recipe(tmp_path, "stage0", None, 2, optimizer__weight_decay=0.0)
    (outcome, *_) = train(recipe, "stage.trainable=[decoder, und_adapter]", *way.overrides, processes=way.processes)
    assert (
        outcome.err.count("stage.trainable: stage0 trains und_adapter, decoder; in the paper it trains und_adap") == 1
    )
    weights = stored(checkpoint(tmp_path / "test-stage0", 2))
    moved = {
        group_of(name.removeprefix("model."))
        for name, weight in weights.items()
        if name.startswith("model.") and not torch.equal(weight, initial(name.removeprefix("model."), weight))
    }
    assert moved == {"und_adapter", "decoder"}
