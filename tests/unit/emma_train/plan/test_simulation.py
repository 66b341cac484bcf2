"""What a simulated rank keeps and sends, against the plan's arithmetic and against counts in closed form."""

from functools import partial
from typing import Any, cast

import pytest
import torch.distributed as dist

from emma_train.config.schema import Recipe
from emma_train.engine.torch_private import tensors_without_memory
from emma_train.engine.units import vision_units
from emma_train.errors import UserError
from emma_train.model.emma import Emma
from emma_train.plan.arithmetic import Plan
from emma_train.plan.simulation import (
    Simulation,
    _alone_among,
    _Counter,
    _engine,
    _loss,
    _small_pack,
    simulate,
)
from emma_train.plan.simulation_table import compared
from emma_train.stages.stage import stage_of
from emma_train.training.optimizer import make_optimizer
from tests.helpers import tiny_recipe
from tests.unit.emma_train.plan.test_plan import FULL, plan

UNITS = 36 + 3 + 1 + 1
"""Of EMMA-4B: its decoder layers, three runs of layers of the vision encoder, the rest of it, and the root."""


def simulated(recipe: Recipe, num_ranks: int) -> Simulation:
    return simulate(recipe, "test", num_ranks, partial(make_optimizer, config=recipe.optimizer))


def assert_as_planned(planned: Plan, counted: Simulation) -> None:
    values = compared(planned, counted)
    assert {"weights", "gradients", "optimizer state", "all-gather", "reduce-scatter"} <= values.keys()
    for name, (value, expected) in values.items():
        assert value == pytest.approx(expected, rel=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "replicas"), [(8, 1), (64, 8), (256, 32)])
def test_pretraining_at_full_size_is_as_planned(gpus: int, replicas: int) -> None:
    planned = plan(FULL / "stage1.yaml", f"engine.replicate={replicas}", gpus=gpus)
    counted = simulated(planned.recipe, gpus)
    assert_as_planned(planned, counted)
    # Every unit is gathered for forward, and all but the root and the last decoder layer again; replicas are summed in
    # the last micro-step alone.
    assert (counted.units, counted.micro_steps) == (UNITS, 256 // gpus)
    assert counted.per_micro_step["all-gather"][0] == 2 * UNITS - 2
    assert counted.collectives["reduce-scatter"][0] == UNITS * counted.micro_steps
    assert counted.collectives.get("all-reduce", (0, 0))[0] == (UNITS if replicas > 1 else 0)


@pytest.mark.slow
def test_alignment_at_full_size_is_as_planned() -> None:
    """Once a step, backward gathers 4 MB of the frozen encoder that it does not need: what its runs of layers leave."""
    planned = plan(FULL / "stage0.yaml", "engine.replicate=32", gpus=256)
    assert_as_planned(planned, simulated(planned.recipe, 256))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"engine__reshard_after_forward": False, "engine__reduce_every_micro_step": False},
        {"engine__replicate": 2, "engine__activation_checkpointing": "full"},
        {"optimizer__kind": "muon", "engine__precision": "bf16"},
    ],
    ids=["default", "kept", "replicas", "muon"],
)
def test_a_small_model_is_as_planned(engine: dict[str, Any]) -> None:
    recipe = tiny_recipe(data__slots=8, **engine)
    assert_as_planned(Plan(recipe, "test", 4, "h100-80g"), simulated(recipe, 4))
    assert not dist.is_initialized()


@pytest.mark.seconds
def test_the_last_layer_stays_gathered_and_the_first_is_gathered_while_the_encoder_runs() -> None:
    """The order of a micro-step's gathers: those that have begun where a module begins forward, and all of them."""
    recipe, begun = tiny_recipe(data__slots=4, engine__reshard_after_forward=True), {}
    batch, mode = _small_pack(recipe.model, True), tensors_without_memory()
    with _alone_among(4) as world:
        optimizer = partial(make_optimizer, config=recipe.optimizer)
        engine = _engine(recipe, stage_of(recipe), world, optimizer, mode)
        model, counter = cast(Emma, engine.model), _Counter()

        def note(name: str, *_: Any) -> None:
            begun[name] = counter.totals()["all-gather"][0]

        for name, module in (("encoder", model.vision.layers[0]), ("last", model.decoder.layers[-1])):
            module.register_forward_pre_hook(partial(note, name))
        with mode, counter:
            engine.accumulate(_loss(engine, batch, stage_of(recipe)), last=True)
        total, units = counter.totals()["all-gather"][0], len(engine.units)
    assert len(vision_units(model.vision).shared) == 1
    # The root, what is left of the encoder, its one run of layers, and the first decoder layer.
    assert begun == {"encoder": 4, "last": units}
    assert total == 2 * units - 2


@pytest.mark.seconds
@pytest.mark.parametrize("stage", ["stage4_expert", "stage4_router"])
def test_what_does_not_run_or_train_is_as_planned(stage: str) -> None:
    """Stages of which a part has no backward pass, or does not run."""
    recipe = tiny_recipe(stage, data__slots=4, engine__reshard_after_forward=True)
    planned, counted = Plan(recipe, "test", 2, "h100-80g"), simulated(recipe, 2)
    assert_as_planned(planned, counted)
    assert counted.collectives["all-gather"][1] < 2 * planned.stored * 4 * counted.micro_steps


def test_what_cannot_be_simulated_is_an_error() -> None:
    for engine, message in (
        ({"engine__kind": "deepspeed"}, "deepspeed is not simulated"),
        ({"engine__sequence_parallel": 2}, "sequence_parallel is not simulated"),
        ({"engine__replicate": 2}, "3 ranks cannot share data.slots=4 in engine.replicate=2"),
    ):
        with pytest.raises(UserError, match=message):
            simulated(tiny_recipe(data__slots=4, **engine), 3)
