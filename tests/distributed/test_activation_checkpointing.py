"""Activation checkpointing inside FSDP units: the gradients of one process that keeps everything."""

import pytest
import torch

from tests.distributed.ranks import one_step
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("reshard", [True, False])
def test_two_ranks_that_compute_again_agree_with_one_that_keeps(mode: str, reshard: bool) -> None:
    kinds = ["mixed", "text", "i2t", "t2i"]
    keeping = tiny_recipe()
    again = tiny_recipe(engine__activation_checkpointing=mode, engine__reshard_after_forward=reshard)
    (alone,) = run_ranks(1, one_step, keeping, kinds)
    for outcome in run_ranks(2, one_step, again, kinds):
        assert outcome.value["loss"] == pytest.approx(alone.value["loss"], rel=1e-6)
        assert outcome.value["gradients"].keys() == alone.value["gradients"].keys()
        for name, gradient in outcome.value["gradients"].items():
            expected = alone.value["gradients"][name]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("stage", ["stage0", "stage4_expert", "stage4_router"])
def test_frozen_stages_have_the_same_gradients_bit_for_bit(stage: str) -> None:
    recipes = [tiny_recipe(stage, engine__activation_checkpointing=mode) for mode in ("none", "full")]
    kept, again = (run_ranks(1, one_step, recipe, ["i2t", "text"], True)[0].value for recipe in recipes)
    assert kept["loss"] == again["loss"] and kept["gradients"].keys() == again["gradients"].keys()
    assert all(torch.equal(again["gradients"][name], gradient) for name, gradient in kept["gradients"].items())
