"""The ledger of a real run that is killed twice: it adds up to what the clock on the wall says."""

import time
from pathlib import Path

import pytest

from emma_train.monitor.goodput import Ledger, read_ledger
from tests.distributed.ranks import command
from tests.distributed.spawn import kill_all, read_outcomes, run_ranks, start_ranks
from tests.helpers import recipe_values, write_recipe
from tests.runs import metrics, train

PAUSE_S = 0.5
"""Between a kill and the next start."""


def killed_after(recipe: Path, step: int, written: Path) -> None:
    """Start the run and end it with SIGKILL when `step` is in its metrics."""
    written.mkdir()
    path = recipe.parent / "run" / "metrics.jsonl"
    (rank,) = start_ranks(1, command, ["train", str(recipe)], folder=written)
    deadline = time.monotonic() + 120
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert rank.is_alive() and time.monotonic() < deadline, read_outcomes(1, written)
        time.sleep(0.002)
    assert rank.pid
    kill_all(rank.pid)
    rank.join()


def ledger_of_run(recipe: Path) -> Ledger:
    ledger = read_ledger(recipe.parent / "run")
    assert ledger is not None
    return ledger


@pytest.mark.slow
def test_two_kills_of_a_run_add_up_to_the_wall_time(tmp_path: Path) -> None:
    settings = {"run__root": str(tmp_path), "run__name": "run", "train__steps": 14, "train__save_every": 5}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(**settings))
    run_ranks(1, command, ["status", str(tmp_path / "none")])  # the server that forks ranks imports torch
    begun = time.time()
    killed_after(recipe, 8, tmp_path / "first")
    time.sleep(PAUSE_S)
    killed_after(recipe, 12, tmp_path / "second")
    time.sleep(PAUSE_S)
    train(recipe)

    ledger, rows = ledger_of_run(recipe), metrics(tmp_path / "run")
    assert ledger.num_starts == 3
    # A process that is forked begins within some milliseconds; the last line is written right after the last row.
    assert ledger.wall_s == pytest.approx(rows[-1]["time_unix"] - begun, rel=0.01)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s, rel=1e-9)
    assert min(ledger.seconds.values()) >= 0.0
    assert ledger.seconds["restart"] > 2 * PAUSE_S
    assert ledger.seconds["start"] > 0
    assert ledger.seconds["repeated"] > 0
    assert rows[-1]["goodput"] == pytest.approx(ledger.goodput, rel=0.05)
    assert ledger.seconds["other"] < 0.1 * ledger.wall_s
    assert [row["seen/samples"] for row in rows] == [12 * step for step in range(1, 15)]
