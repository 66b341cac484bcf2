"""A job of two ranks is killed thirty times, half of them in the middle of a save, and resumes each time from the last
complete checkpoint; in the end its state equals that of an undisturbed job.

torchrun is not used, because it would take most of the time: when one rank dies, the test ends the other as it does.
"""

import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from tests.distributed.ranks import command
from tests.distributed.spawn import kill_all, read_outcomes, start_ranks
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored, train

KILLS, STEPS = 30, 150
SAVE_S = 0.2
"""Kills come within this time after the begin of a save; if the save has ended by then, the next one is used."""


def newest_step(run: Path) -> int | None:
    newest = folders.newest_checkpoint(run / "checkpoints")
    return None if newest is None else int(newest.name.removeprefix("step-"))


def saving(run: Path, since: float = 0.0) -> bool:
    """Whether there is an incomplete checkpoint that was begun after `since`."""
    return any(_changed(path) > since for path in (run / "checkpoints").glob("step-*.tmp"))


def steps_logged(run: Path, since: float) -> int:
    """Steps in the log, once a process that started after `since` has opened it."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if _changed(path) > since else 0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def wait_for(reached: Callable[[], bool], ranks: list[BaseProcess], written: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert all(rank.is_alive() for rank in ranks), f"a rank ended by itself: {read_outcomes(2, written)}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(ranks: list[BaseProcess], one: int | None) -> None:
    """Kill all at once, as when a node goes down, or one rank; as under torchrun, the other then gets a SIGTERM, and a
    SIGKILL where it has not ended after 30 s."""
    if one is not None:
        ranks[one].kill()
        ranks[1 - one].terminate()
        ranks[1 - one].join(30)
    for rank in ranks:
        if rank.is_alive() and rank.pid:
            kill_all(rank.pid)
        rank.join()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_kills_lose_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # A large vocabulary makes saves long compared with steps: 17 MB in all, of which 4 MB are weights.
    recipe = make_recipe(
        tmp_path, "stage1", train={"steps": STEPS, "save_every": 3, "keep": 2, "log_every": 1}, data={"slots": 2}
    )
    overrides = ("model.decoder.vocab=32768", "data.samples_per_step=4")
    train(recipe, "run.name=straight", *overrides, processes=2, timeout_s=300)
    run, rng, in_saves = tmp_path / "killed", random.Random(0), 0
    for number in range(KILLS):
        before, started = newest_step(run) or 0, time.time()
        written = tmp_path / f"start-{number}"
        written.mkdir()
        ranks = start_ranks(2, command, ["train", str(recipe), "run.name=killed", *overrides], folder=written)
        one = rng.choice([None, None, 0, 1])
        try:
            if number % 2:
                delay = rng.uniform(0, SAVE_S)
                while True:
                    wait_for(lambda: saving(run, started), ranks, written)  # noqa: B023
                    time.sleep(delay)
                    if saving(run, started):
                        break
                    delay /= 2
            elif number % 6:
                steps = rng.randint(1, 5)
                wait_for(lambda: steps_logged(run, started) >= before + steps, ranks, written)  # noqa: B023
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0.5, 5))  # while it starts, loads or checks the files
        finally:
            kill(ranks, one)
        err = "".join(outcome.err for outcome in read_outcomes(2, written))
        in_saves += saving(run, started)
        assert "resumed" not in err or f"resumed {checkpoint(run, before)}" in err
        assert "cannot be used" not in err
        assert (newest_step(run) or 0) >= before, number
        for folder in folders.list_steps(run / "checkpoints"):
            assert verify.find_damage(folder) is None, (number, folder)
    assert in_saves >= KILLS // 2 - 1  # one may have been committed before the signal arrived
    outcomes = train(recipe, "run.name=killed", *overrides, processes=2, timeout_s=300)
    assert f"resumed {run}" in outcomes[0].err
    straight = tmp_path / "straight"
    assert learnt(run) == learnt(straight)
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))) == []
    assert not saving(run)
