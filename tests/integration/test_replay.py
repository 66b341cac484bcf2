"""health.replay: a bit that flips in a gradient is noticed and its rank named; the run equals one without it."""

import json
import re
from pathlib import Path

import pytest

from emma_train.cli import main
from tests.distributed.failing import flipping_command
from tests.distributed.spawn import run_ranks
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored, train

STEPS = 6


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = {"steps": STEPS, "save_every": 2, "log_every": 1}
    return make_recipe(tmp_path_factory.mktemp("replay"), mix={"i2t": 1, "t2i": 1, "it2i": 1}, train=steps)


def assert_same_run(run: Path, other: Path) -> None:
    assert learnt(run) == learnt(other)
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(other, STEPS))) == []
    assert main(["audit", str(run), str(other)]) == 0


@pytest.mark.parametrize("reduce", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_flip_is_noticed_and_the_run_equals_one_without_it(recipe: Path, reduce: str) -> None:
    """Rank 1 flips a bit in the second pass of the replay after step 3."""
    options = [f"engine.reduce_every_micro_step={reduce}", "engine.activation_checkpointing=selective"]
    plain, run = recipe.parent / f"plain-{reduce}", recipe.parent / f"flipped-{reduce}"
    train(recipe, f"run.name={plain.name}", *options, processes=2)
    words = ["train", str(recipe), f"run.name={run.name}", "health.replay=3", *options]
    outcomes = run_ranks(2, flipping_command, words, 1, [1], timeout_s=180)
    assert [outcome.value for outcome in outcomes] == [0, 0]
    (line,) = [json.loads(line) for line in (run / "rewinds.jsonl").read_text().splitlines() if line]
    (text,) = line["mismatches"]
    assert line["step"] == 3
    assert re.fullmatch(r"rank 1 on \S+ computed \S+ and \d+ more twice, to other bits", text)
    assert f"step 3: {text}; back to the newest checkpoint, nothing is skipped" in outcomes[0].err
    steps = [json.loads(line)["step"] for line in (run / "digests.jsonl").read_text().splitlines() if line]
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    assert_same_run(run, plain)


@pytest.mark.slow
def test_clean_steps_raise_no_alarm_and_change_no_bit(recipe: Path) -> None:
    train(recipe, "run.name=clean")
    train(recipe, "run.name=replayed", "health.replay=1")
    assert not (recipe.parent / "replayed" / "rewinds.jsonl").exists()
    assert_same_run(recipe.parent / "replayed", recipe.parent / "clean")


@pytest.mark.slow
def test_a_rank_that_goes_on_computing_wrongly_ends_the_run(recipe: Path) -> None:
    words = ["train", str(recipe), "run.name=broken", "health.replay=1", "health.max_rewinds=2"]
    (outcome,) = run_ranks(1, flipping_command, words, 0, [0, 2, 4])
    assert outcome.value == 1
    assert "this was so 2 times before (health.max_rewinds). Exclude that node" in outcome.error_lines[-1]
