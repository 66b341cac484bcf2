"""A run that hangs says where: rank, loader worker and sample are named, and then it ends with exit code 1."""

import re
from pathlib import Path

import pytest

from tests.distributed.failing import hanging_command
from tests.distributed.spawn import read_outcomes, start_ranks
from tests.integration.conftest import MakeRecipe

STEP_TIMEOUT_S = 7


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers", "victim"), [("stopped", 2, 0), ("store", 2, 1)])
def test_a_loader_that_hangs_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, how: str, workers: int, victim: int
) -> None:
    recipe = make_recipe(
        tmp_path,
        train={"steps": 9, "save_every": 99},
        data={"slots": 4, "samples_per_step": 8, "workers": workers, "prefetch": 2},
        engine={"step_timeout_s": STEP_TIMEOUT_S},
    )
    (tmp_path / "ranks").mkdir()
    ranks = start_ranks(2, hanging_command, ["train", str(recipe)], victim, how, 9, folder=tmp_path / "ranks")
    for rank in ranks:
        rank.join(120)
    outcomes = read_outcomes(2, tmp_path / "ranks")
    assert all(rank.exitcode == 1 or outcome.value == 1 for rank, outcome in zip(ranks, outcomes, strict=True))
    (path,) = (tmp_path / "stage1" / "logs").glob("hang-after-*.txt")
    lines = path.read_text().splitlines()
    waited = re.fullmatch(r"no progress after step [1-4] for (\d+) s", lines[0])
    assert waited and int(waited[1]) <= STEP_TIMEOUT_S
    assert {line.partition(",")[0] for line in lines[1:3]} == {
        f"rank {victim}: waits for a pack of its loader",
        f"rank {1 - victim}: waits in all-reduce",
    }
    for outcome in outcomes:  # a rank that is late has lost the others, and does not take them for dead
        assert not re.search(rf"rank {1 - victim} of 2 (died|hangs|failed)", outcome.err), outcome.err
    said = [line for outcome in outcomes for line in outcome.err.splitlines() if "no progress after" in line]
    culprit = (
        r"loader worker \(process \d+\) is stopped \(SIGSTOP\)"
        if how == "stopped"
        else r"reads \S+ of shard-\d+\.tar since \d+ s"
    )
    assert len(said) == 1 and re.search(rf"; rank {victim} {culprit} \(", said[0]), said
