"""Ranks whose packs hold different things neither hang nor differ from one process that computes all of them."""

import math

import pytest
import torch

from tests.distributed.ranks import one_step
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe

TIME_LIMIT_S = 60


KINDS = [
    ["i2t", "t2i"],  # one rank has no target, the other nothing to understand
    ["it2i", "i2t"],  # references on one rank only
    ["t2i", "silent"],  # no rank has a supervised token
    ["silent", "i2t"],  # one rank has no token of any loss
    ["text", "mixed"],  # one rank has no image at all
    ["text", "t2i"],  # nobody sees an image
    ["i2t", "t2i", "text", "it2i"],  # two packs each
]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_asymmetric_packs_end_with_the_gradients_of_one_process(kinds: list[str]) -> None:
    recipe = tiny_recipe()
    (alone,) = run_ranks(1, one_step, recipe, kinds, timeout_s=TIME_LIMIT_S)
    together = run_ranks(2, one_step, recipe, kinds, timeout_s=TIME_LIMIT_S)
    for outcome in together:
        step = outcome.value
        assert math.isfinite(step["norm"])
        assert step["norm"] > 0
        assert step["loss"] == pytest.approx(alone.value["loss"], rel=1e-6)
        assert step["norm"] == pytest.approx(alone.value["norm"], rel=1e-5)
        assert step["gradients"].keys() == alone.value["gradients"].keys()
        for name, gradient in step["gradients"].items():
            assert torch.isfinite(gradient).all(), name
            expected = alone.value["gradients"][name]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.slow
def test_asymmetric_packs_end_under_deepspeed_too(kinds: list[str], stage: int) -> None:
    recipe = tiny_recipe(engine__kind="deepspeed", engine__zero_stage=stage)
    (alone,) = run_ranks(1, one_step, tiny_recipe(), kinds, timeout_s=TIME_LIMIT_S)
    for outcome in run_ranks(2, one_step, recipe, kinds, timeout_s=TIME_LIMIT_S):
        assert outcome.value["loss"] == pytest.approx(alone.value["loss"], rel=1e-6)
        assert outcome.value["norm"] == pytest.approx(alone.value["norm"], rel=1e-5)


@pytest.mark.parametrize("kind", ["i2t", "t2i", "silent", "text"])
def test_every_trainable_parameter_has_a_gradient_whatever_a_pack_holds(kind: str) -> None:
    """Zero where the pack says nothing about it: otherwise ranks would reduce different tensors."""
    (outcome,) = run_ranks(1, one_step, tiny_recipe(), [kind], timeout_s=TIME_LIMIT_S)
    (mixed,) = run_ranks(1, one_step, tiny_recipe(), ["mixed"], timeout_s=TIME_LIMIT_S)
    assert outcome.value["gradients"].keys() == mixed.value["gradients"].keys()
    zero = {name for name, gradient in outcome.value["gradients"].items() if not gradient.any()}
    if kind == "silent":
        assert outcome.value["norm"] == 0.0
    if kind in ("i2t", "text"):
        assert {n for n in outcome.value["gradients"] if n.startswith(("velocity_head.", "gen_adapter."))} <= zero
    if kind == "t2i":
        assert {n for n in outcome.value["gradients"] if n.startswith(("vision.", "und_adapter."))} <= zero


@pytest.mark.parametrize("stage", ["stage4_expert", "stage4_router"])
def test_a_rank_without_stem_images_keeps_step_in_stage_4(stage: str) -> None:
    both = run_ranks(2, one_step, tiny_recipe(stage), ["i2t", "text"], True, timeout_s=TIME_LIMIT_S)
    assert all(math.isfinite(outcome.value["norm"]) for outcome in both)
