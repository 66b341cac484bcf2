"""Local checkpoints through the command line: a node is lost with its folder, or its files are damaged."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.local_saving import crashing_command
from tests.distributed.spawn import Outcome, run_ranks
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train

STEPS, CRASH = 8, 7


def run_on(recipe: Path, names: str, *overrides: str, crash: int = 0, code: int = 0) -> list[Outcome]:
    """`emma-train train` on nodes, one rank for each letter; it fails before step `crash`."""
    outcomes = run_ranks(len(names), crashing_command, ["train", str(recipe), *overrides], names, crash, timeout_s=180)
    for outcome in outcomes:
        assert outcome.value == code, outcome.err
    return outcomes


@pytest.mark.slow
def test_a_run_that_lost_a_node_with_its_folder_equals_one_that_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Checkpoints of steps 4 and 8 on shared storage, local ones of every second step."""
    recipe = make_recipe(tmp_path, "stage0", train={"steps": STEPS, "save_every": 4, "log_every": 1})
    straight, run, nodes = tmp_path / "straight", tmp_path / "run", tmp_path / "nodes"
    train(recipe, "run.name=straight", processes=2)
    # A local checkpoint is left out while another save runs, as that of step 4 may where steps take milliseconds.
    overrides = ("train.local_every=2", f"train.local_folder={nodes}/{{node}}", "train.save_async=false")
    run_on(recipe, "ab", "run.name=run", *overrides, crash=CRASH, code=1)
    assert not checkpoint(run, CRASH - 1).exists()
    shutil.rmtree(nodes / "b")
    outcomes = run_on(recipe, "ac", "run.name=run", *overrides)
    assert f"local checkpoint of step {CRASH - 1}: copied to {checkpoint(run, CRASH - 1)}" in outcomes[0].err
    assert f"resumed {checkpoint(run, CRASH - 1)}" in outcomes[0].err
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert learnt(run) == learnt(straight)
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))) == []
    digests = [sorted((folder / "digests.jsonl").read_text().split("\n")) for folder in (run, straight)]
    assert digests[0] == digests[1] and len(digests[0]) == STEPS + 1
    assert not list(nodes.glob("*/*"))  # all steps are on shared storage
