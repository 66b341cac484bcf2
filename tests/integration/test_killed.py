"""A two-process job under torchrun is killed thirty times, half of them in the middle of a save, and resumes each time
from the last complete checkpoint; in the end its state equals that of an undisturbed job."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from tests.distributed.spawn import family, kill_all, run_command, start_command
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored

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


def wait_for(reached: Callable[[], bool], command: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert command.poll() is None, f"ended by itself\n{command.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(command: subprocess.Popen[str], one: int | None) -> None:
    """Kill all at once, as when a node goes down, or one of the two ranks; torchrun then ends the other."""
    if one is None:
        kill_all(command)
    else:
        os.kill(family(command.pid)[1 + one], signal.SIGKILL)
    command.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_kills_lose_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # A large vocabulary makes saves long compared with steps: 17 MB in all, of which 4 MB are weights.
    recipe = make_recipe(
        tmp_path, "stage1", train={"steps": STEPS, "save_every": 3, "keep": 2, "log_every": 1}, data={"slots": 2}
    )
    overrides = ("model.decoder.vocab=32768", "data.samples_per_step=4")
    run_command("train", str(recipe), "run.name=straight", *overrides, processes=2, timeout_s=300)
    run, rng, in_saves = tmp_path / "killed", random.Random(0), 0
    for number in range(KILLS):
        before, started = newest_step(run) or 0, time.time()
        command = start_command("train", str(recipe), "run.name=killed", *overrides, processes=2)
        one = rng.choice([None, None, 0, 1])
        try:
            if number % 2:
                delay = rng.uniform(0, SAVE_S)
                while True:
                    wait_for(lambda: saving(run, started), command)  # noqa: B023
                    time.sleep(delay)
                    if saving(run, started):
                        break
                    delay /= 2
            elif number % 6:
                steps = rng.randint(1, 5)
                wait_for(lambda: steps_logged(run, started) >= before + steps, command)  # noqa: B023
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(1, 8))  # while it starts, loads or checks the files
            kill(command, one)
        finally:
            kill_all(command)
        _, err = command.communicate()
        in_saves += saving(run, started)
        if "resumed" in err:
            assert f"resumed {checkpoint(run, before)}" in err
        assert "cannot be used" not in err
        assert (newest_step(run) or 0) >= before, number
        for folder in folders.list_steps(run / "checkpoints"):
            assert verify.find_damage(folder) is None, (number, folder)
    assert in_saves >= KILLS // 2 - 1  # one may have been committed before the signal arrived
    outcome = run_command("train", str(recipe), "run.name=killed", *overrides, processes=2, timeout_s=300)
    assert f"resumed {run}" in outcome.err
    straight = tmp_path / "straight"
    assert learnt(run) == learnt(straight)
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))) == []
    assert not saving(run)
