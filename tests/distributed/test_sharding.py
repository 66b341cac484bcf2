"""How FSDP divides the model: meshes, frozen units, and a Gen branch that is skipped."""

from pathlib import Path

import pytest

from tests.distributed.collective_ranks import reductions
from tests.distributed.ranks import gathered_gen, norm_over_meshes, spread
from tests.distributed.spawn import run_ranks
from tests.helpers import recipe_values, tiny_recipe, write_recipe
from tests.runs import train


@pytest.mark.parametrize(("stage", "gathered"), [("stage0", False), ("stage4_expert", False), ("stage1", True)])
def test_a_stage_that_makes_no_images_never_gathers_the_gen_branch(stage: str, gathered: bool) -> None:
    recipe = tiny_recipe(stage, engine__reshard_after_forward=False)
    for outcome in run_ranks(2, gathered_gen, recipe):
        assert outcome.value == {"und": {True}, "gen": {gathered}}


def test_one_norm_of_gradients_on_three_meshes() -> None:
    """1-D, replicas x shards, and replicated on every rank: the norm equals that of one process."""
    for outcome in run_ranks(4, norm_over_meshes):
        norm, expected = outcome.value
        assert norm == pytest.approx(expected, rel=1e-6)


def test_replicas_and_frozen_units() -> None:
    """Values that each of four ranks holds, over those of the parameter group."""
    plain = run_ranks(4, spread, tiny_recipe("stage4_expert"))[0].value
    assert plain["decoder"] == pytest.approx(1 / 4, rel=0.02)
    halves = run_ranks(4, spread, tiny_recipe("stage4_expert", engine__replicate=2))[0].value
    assert halves["decoder"] == pytest.approx(1 / 2, rel=0.02)
    kept = run_ranks(4, spread, tiny_recipe("stage4_expert", engine__frozen="replicated"))[0].value
    assert kept["layers"] == 1.0
    # The expert trains in this stage, so it is sharded.
    assert kept["stem_expert"] == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("every_micro_step", [True, False])
def test_replicas_sum_gradients_in_the_last_micro_step_only(every_micro_step: bool) -> None:
    kinds = ["mixed", "t2i", "i2t"]
    _, _, expected = run_ranks(1, reductions, tiny_recipe(), kinds)[0].value
    recipe = tiny_recipe(engine__replicate=2, engine__reduce_every_micro_step=every_micro_step)
    for outcome in run_ranks(4, reductions, recipe, kinds):
        num_units, counts, norm = outcome.value
        before_last = (num_units if every_micro_step else 0, 0)
        assert counts == [before_last, before_last, (num_units, num_units)]
        assert norm == pytest.approx(expected, rel=1e-5)  # four ranks with the same packs: sums over sums


def test_replicas_that_do_not_divide_the_ranks_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values("stage1", run__root=str(tmp_path), engine__replicate=3))
    for outcome in train(recipe, processes=2, code=2):
        assert "engine.replicate is 3, which does not divide 2 processes" in outcome.error_lines[-1]
