"""A gradient that is not finite changes nothing, under any engine; no tensor of a step outlives it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.failing import diverging_command
from tests.distributed.ranks import live_tensors, models_left, steps_with_poison
from tests.distributed.spawn import run_ranks
from tests.helpers import recipe_values, tiny_recipe, write_recipe

KINDS = ["it2i", "i2t"]
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    **{f"zero{stage}": {"engine__kind": "deepspeed", "engine__zero_stage": stage} for stage in (1, 2, 3)},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["fsdp", "zero3", *SLOW])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any(engine: str, precision: str) -> None:
    """The next step equals the one that a healthy run takes."""
    recipe = tiny_recipe(engine__precision=precision, **ENGINES[engine])
    for outcome in run_ranks(2, steps_with_poison, recipe, KINDS, 1):
        steps = outcome.value
        assert steps["moved"] is False
        assert [norm for norm in steps["norms"] if not torch.isfinite(torch.tensor(norm))] == [steps["norms"][1]]
    healthy = run_ranks(2, steps_with_poison, recipe, KINDS, None)[0].value
    assert steps["norms"][0] == healthy["norms"][0]
    # The healthy run took one step more, so compare with the norm of its second step.
    assert steps["norms"][2] == healthy["norms"][1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3", *SLOW])
def test_no_tensor_outlives_its_step(engine: str) -> None:
    """Fifty steps without garbage collection: a cycle or a cache would show."""
    recipe = tiny_recipe(ema__decay=0.9, **ENGINES[engine])
    for outcome in run_ranks(2, live_tensors, recipe, KINDS, 50):
        counts = outcome.value
        # Gradients of the last pack may not be freed yet when tensors are counted.
        assert max(counts) - min(counts) <= 4, counts


def test_a_run_whose_every_step_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    settings = {"run__root": str(tmp_path), "run__name": "nan", "train__steps": 9}
    recipe = write_recipe(tmp_path / "nan.yaml", recipe_values("stage1", train__max_skipped_steps=3, **settings))
    main, other = run_ranks(2, diverging_command, ["train", str(recipe)], 0)
    assert (main.value, other.value) == (1, 1)
    assert "3 steps in a row had a gradient that is not finite (train.max_skipped_steps)" in main.error_lines[-1]
    assert "skipped_steps.jsonl lists the samples" in main.error_lines[-1]
    lines = [json.loads(line) for line in (tmp_path / "nan" / "skipped_steps.jsonl").read_text().splitlines()]
    assert sorted((line["step"], line["rank"]) for line in lines) == [(s, r) for s in (1, 2, 3) for r in (0, 1)]
    # 12 samples a step, 6 on each rank.
    assert all(len(line["keys"]) == 6 for line in lines)


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow), *SLOW])
def test_a_stage_leaves_nothing_of_its_model_to_the_next(engine: str) -> None:
    """A pipeline runs in one process: what one stage kept would be missing to the next."""
    assert [outcome.value for outcome in run_ranks(2, models_left, tiny_recipe(**ENGINES[engine]), KINDS)] == [0, 0]
