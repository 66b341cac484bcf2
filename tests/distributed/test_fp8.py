"""engine.fp8 under FSDP: it learns as bf16 does, on any number of ranks, and goes on to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engines import LOSSES, stage_recipe
from tests.distributed.ranks import one_step
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe
from tests.runs import checkpoint, differences, learnt, stored, train

STEPS, STOP = 20, 9
KINDS = ("tensorwise", "rowwise")


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_gradients_of_one(kind: str) -> None:
    """Scales are those of a pack, whoever computes it; also where a branch, or the vision encoder, has no rows."""
    recipe = tiny_recipe(engine__precision="bf16", engine__fp8=kind)
    kinds = ["mixed", "text", "i2t", "t2i"]
    (alone,) = run_ranks(1, one_step, recipe, kinds)
    for outcome in run_ranks(2, one_step, recipe, kinds):
        assert outcome.value["loss"] == pytest.approx(alone.value["loss"], rel=1e-6)
        assert outcome.value["gradients"].keys() == alone.value["gradients"].keys()
        for name, gradient in outcome.value["gradients"].items():
            expected = alone.value["gradients"][name]
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A recipe in bf16 and the losses of its run."""
    recipe = stage_recipe(tmp_path_factory.mktemp("fp8"), "stage1", None, STEPS, engine__precision="bf16")
    train(recipe, "run.name=bf16")
    return recipe, learnt(recipe.parent / "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lose_what_bf16_loses_and_a_resumed_run_equals_one_that_never_stopped(
    bf16: tuple[Path, list[dict[str, Any]]], kind: str
) -> None:
    """Each loss within 1 % of bf16's in the mean of the steps."""
    recipe, exact = bf16
    straight, stopped = recipe.parent / kind, recipe.parent / f"stopped-{kind}"
    train(recipe, f"run.name={straight.name}", f"engine.fp8={kind}")
    for steps in (STOP, STEPS):
        train(recipe, f"run.name={stopped.name}", f"engine.fp8={kind}", f"train.steps={steps}")
    rounded = learnt(straight)
    assert rounded[0]["loss"] != exact[0]["loss"]
    for key in LOSSES:
        assert sum(line[key] for line in rounded) == pytest.approx(sum(line[key] for line in exact), rel=0.01)
    assert exact[-1]["loss"] < 0.95 * exact[0]["loss"]
    assert learnt(stopped) == rounded
    assert differences(stored(checkpoint(stopped, STEPS)), stored(checkpoint(straight, STEPS))) == []
