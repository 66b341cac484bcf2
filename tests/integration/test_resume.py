"""Stop anywhere, run the same command again: the result equals the uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emma_train.config.load import load_recipe
from tests.distributed.spawn import kill_all, run_command, start_command
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train

STEPS = 12


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mix = {"i2t": 1, "t2i": 1, "it2i": 1}
    return make_recipe(
        tmp_path_factory.mktemp("resume"), mix=mix, train={"steps": STEPS, "save_every": 4, "log_every": 1}
    )


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """The uninterrupted run."""
    train(recipe, "run.name=straight")
    return recipe.parent / "straight"


def assert_same_end(run: Path, straight: Path) -> None:
    """Every logged number, and every weight, moment, step counter and average of the last checkpoint."""
    assert learnt(run) == learnt(straight)
    one, other = stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))
    assert {name.split(".")[0] for name in one} == {"model", "optimizer", "ema"}
    assert differences(one, other) == []


def wait_until(command: subprocess.Popen[str], reached: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("stops", [(1,), (3, 4, 7)])
def test_stopping_after_any_step_changes_nothing(recipe: Path, straight: Path, stops: tuple[int, ...]) -> None:
    name = "stop" + "-".join(map(str, stops))
    for stop in stops:
        train(recipe, f"run.name={name}", f"train.steps={stop}")
        assert len(metrics(recipe.parent / name)) == stop
    train(recipe, f"run.name={name}")
    assert_same_end(recipe.parent / name, straight)


def test_a_killed_run_goes_on_from_its_last_checkpoint(recipe: Path, straight: Path) -> None:
    """SIGKILL between checkpoints: steps logged after the last checkpoint are computed again, to the same bits."""
    run = recipe.parent / "killed"
    command = start_command("train", str(recipe), "run.name=killed")
    try:
        wait_until(command, lambda: steps_logged(run) >= 6)
    finally:
        kill_all(command.pid)
    command.communicate()
    assert command.returncode == -signal.SIGKILL
    assert 6 <= steps_logged(run) < STEPS
    outcome = run_command("train", str(recipe), "run.name=killed")
    assert "resumed" in outcome.err
    assert_same_end(run, straight)


def test_a_run_that_is_asked_to_stop_saves_and_exits_with_75(recipe: Path, straight: Path) -> None:
    run = recipe.parent / "asked"
    command = start_command("train", str(recipe), "run.name=asked")
    try:
        wait_until(command, lambda: steps_logged(run) >= 3)
        command.send_signal(signal.SIGTERM)
        _, err = command.communicate(timeout=60)
    finally:
        kill_all(command.pid)
    assert command.returncode == 75, err
    assert "SIGTERM: stopping after this step" in err
    assert "Traceback" not in err
    stopped = steps_logged(run)
    assert 3 <= stopped < STEPS
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{stopped:08d}"
    run_command("train", str(recipe), "run.name=asked")
    assert_same_end(run, straight)


def test_a_request_to_stop_that_reaches_the_loader_workers_too_is_obeyed(recipe: Path, straight: Path) -> None:
    """Clusters send the signal to every process of the job."""
    run = recipe.parent / "all-asked"
    command = start_command("train", str(recipe), "run.name=all-asked", "data.workers=2")
    try:
        wait_until(command, lambda: steps_logged(run) >= 3)
        os.killpg(command.pid, signal.SIGTERM)
        _, err = command.communicate(timeout=60)
    finally:
        kill_all(command.pid)
    assert command.returncode == 75, err
    assert "Traceback" not in err
    run_command("train", str(recipe), "run.name=all-asked", "data.workers=1")
    assert_same_end(run, straight)


def test_a_loader_worker_that_dies_ends_the_run_with_one_line(recipe: Path, straight: Path) -> None:
    run = recipe.parent / "orphan"
    command = start_command("train", str(recipe), "run.name=orphan", "data.workers=2", "data.prefetch=1")
    try:
        wait_until(command, lambda: steps_logged(run) >= 3)
        os.kill(children(command.pid)[-1], signal.SIGKILL)
        _, err = command.communicate(timeout=60)
    finally:
        kill_all(command.pid)
    assert command.returncode == 1, err
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert "DataLoader worker" in last and "lower data.workers" in last
    assert "emma_train/" not in err  # no traceback of our code; torch's clean-up may print that it ignores an exception
    run_command("train", str(recipe), "run.name=orphan")
    assert_same_end(run, straight)


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_save_together(recipe: Path, straight: Path) -> None:
    """Only one rank gets the signal; both stop after the same step. Then one process resumes, on the same data."""
    run = recipe.parent / "two"
    command = start_command("train", str(recipe), "run.name=two", processes=2)
    try:
        wait_until(command, lambda: steps_logged(run) >= 3)
        os.kill(children(command.pid)[-1], signal.SIGTERM)
        _, err = command.communicate(timeout=90)
    finally:
        kill_all(command.pid)
    assert command.returncode != 0
    assert "exitcode: 75" in err
    stopped = steps_logged(run)
    assert 3 <= stopped < STEPS
    meta = json.loads((checkpoint(run, stopped) / "meta.json").read_text())
    assert (meta["step"], meta["world_size"]) == (stopped, 2)
    train(recipe, "run.name=two")
    assert_same_data_and_losses(run, straight)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_same_data_and_losses(run: Path, straight: Path) -> None:
    for one, other in zip(learnt(run), learnt(straight), strict=True):
        assert one["data/digest"] == other["data/digest"]
        for key in ("loss", "loss/i2t", "loss/t2i", "loss/it2i"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)


@pytest.mark.parametrize(
    "sizes", [(2, 1), pytest.param((1, 3), marks=pytest.mark.slow), pytest.param((3, 2), marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_another_number_of_processes(recipe: Path, straight: Path, sizes: tuple[int, int]) -> None:
    name = f"from{sizes[0]}to{sizes[1]}"
    train(recipe, f"run.name={name}", "train.steps=5", processes=sizes[0])
    train(recipe, f"run.name={name}", processes=sizes[1])
    assert_same_data_and_losses(recipe.parent / name, straight)


def test_moments_after_a_resume_are_not_zero(recipe: Path) -> None:
    train(recipe, "run.name=moments", "train.steps=4")
    train(recipe, "run.name=moments", "train.steps=5")
    state = stored(checkpoint(recipe.parent / "moments", 5))
    steps = {float(value) for name, value in state.items() if name.endswith(".step")}
    assert steps == {5.0}


def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(recipe: Path, straight: Path) -> None:
    run = recipe.parent / "torn"
    train(recipe, "run.name=torn", "train.steps=6")
    shard = next(checkpoint(run, 6).rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (outcome,) = train(recipe, "run.name=torn")
    assert "step-00000006 cannot be used: " in outcome.err
    assert "step-00000006: set aside as step-00000006.damaged" in outcome.err
    assert "resumed" in outcome.err
    assert "step-00000004" in outcome.err
    assert "steps 5 to 6 are computed again: the checkpoint is of step 4" in outcome.err
    assert_same_end(run, straight)


def test_a_recipe_that_contradicts_the_checkpoint_is_refused_with_the_way_round(recipe: Path) -> None:
    train(recipe, "run.name=other", "train.steps=2")
    (outcome,) = train(recipe, "run.name=other", "train.steps=3", "optimizer.lr=5.0e-4", code=2)
    (line,) = outcome.error_lines
    assert "optimizer.lr is 0.0005 in the recipe and 0.0015 in the checkpoint" in line
    assert "resume.allow=[optimizer.lr]" in line
    train(recipe, "run.name=other", "train.steps=3", "optimizer.lr=5.0e-4", "resume.allow=[optimizer.lr]")
    assert metrics(recipe.parent / "other")[-1]["lr"] == 5e-4


def test_what_the_recipe_does_not_set_stays_as_in_the_checkpoint(recipe: Path) -> None:
    train(recipe, "run.name=unset", "train.steps=1", "flow.logit_std=0.5")
    (outcome,) = train(recipe, "run.name=unset", "train.steps=2")
    assert outcome.err.count("flow.logit_std stays 0.5; the recipe does not set it, and its default is 1.0") == 1
    assert load_recipe(recipe.parent / "unset" / "config.yaml").flow.logit_std == 0.5
    (outcome,) = train(recipe, "run.name=unset", "train.steps=3", "flow.logit_std=1.0", code=2)
    assert "flow.logit_std is 1.0 in the recipe and 0.5 in the checkpoint" in outcome.err


@pytest.mark.parametrize("override", ["data.seed=7", "data.samples_per_step=12", "data.slots=3", "mix.it2i=2"])
def test_other_data_is_a_contradiction_too(recipe: Path, override: str) -> None:
    train(recipe, "run.name=data", "train.steps=1")
    (outcome,) = train(recipe, "run.name=data", "train.steps=2", override, code=2)
    (line,) = outcome.error_lines
    assert override.split("=")[0] in line
