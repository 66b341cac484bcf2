"""Checkpoints through the command line: locks, damage, full disks, copies, trackers, retention."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from launchers.command import torchrun_environment
from tests.chaos.agent import run_agent
from tests.chaos.trainer import SHORT_WAITS_VARIABLE
from tests.distributed.ranks import full_disk_command
from tests.distributed.spawn import ROOT, fork_server, kill_all, run_command, run_ranks, start_command
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, metrics, stored, train, train_until

STEPS = 8


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 0, which freezes all but an adapter; a checkpoint every other step."""
    root = tmp_path_factory.mktemp("checkpoints")
    return make_recipe(root, "stage0", train={"steps": STEPS, "save_every": 2, "log_every": 1})


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    train(recipe, "run.name=straight")
    return recipe.parent / "straight"


def half(recipe: Path, name: str) -> Path:
    """A run that was stopped after step 4, with checkpoints of 2 and 4."""
    train_until(recipe, 4, f"run.name={name}")
    return recipe.parent / name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_job_in_the_same_run_folder_is_refused(recipe: Path) -> None:
    run = recipe.parent / "shared"
    first = start_command("train", str(recipe), "run.name=shared", "train.steps=9999")
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for processes in (1, 2):
            outcomes = train(recipe, "run.name=shared", "train.steps=9999", processes=processes, code=2)
            for outcome in outcomes:
                (line,) = outcome.error_lines
                assert "is being trained by another job (process" in line
        assert first.poll() is None
    finally:
        kill_all(first.pid)
    first.communicate()
    # A killed run does not block the next one.
    newest = folders.newest_checkpoint(run / "checkpoints")
    done = 0 if newest is None else int((folders.read_meta(newest) or {})["step"])
    train_until(recipe, done + 1, "run.name=shared", "train.steps=9999")


def test_a_damaged_checkpoint_is_named_and_the_run_ends_as_if_it_had_stopped_before(
    recipe: Path, straight: Path
) -> None:
    for number, pattern in enumerate(("weights/.metadata", "optimizer/__0_0.distcp", "meta.json")):
        run = half(recipe, f"damaged{number}")
        flip(checkpoint(run, 4) / pattern)
        (outcome,) = train(recipe, f"run.name={run.name}")
        assert "step-00000004 cannot be used: " in outcome.err
        assert "step-00000004: set aside as step-00000004.damaged" in outcome.err
        assert f"resumed {checkpoint(run, 2)}" in outcome.err
        assert learnt(run) == learnt(straight)
        assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))) == []


def test_where_no_checkpoint_can_be_used_the_run_does_not_begin_anew(recipe: Path) -> None:
    run = half(recipe, "hopeless")
    (frozen,) = (run / "checkpoints" / "frozen").iterdir()
    flip(frozen / "__0_0.distcp")
    before = names(run / "checkpoints")
    (outcome,) = train(recipe, "run.name=hopeless", code=2)
    assert "none of its 2 checkpoints can be used" in outcome.error_lines[-1]
    assert f"{frozen.name}/__0_0.distcp is damaged" in outcome.error_lines[-1]
    assert names(run / "checkpoints") == before


def test_the_next_stage_never_starts_from_a_damaged_checkpoint(
    recipe: Path, straight: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(straight, tmp_path / "source"))
    flip(checkpoint(source, STEPS) / "weights" / "__0_0.distcp")
    later = make_recipe(tmp_path, "stage1", init={"from": str(source)})
    (outcome,) = train(later, "train.steps=1")
    assert f"step-{STEPS:08d} cannot be used: weights/__0_0.distcp is damaged" in outcome.err
    parent = (folders.read_valid_meta(checkpoint(tmp_path / "stage1", 1)) or {})["parent"]
    assert (parent["stage"], parent["step"]) == ("stage0", STEPS - 2)
    shutil.rmtree(source / "checkpoints" / "frozen")
    (outcome,) = train(later, "run.name=never", code=2)
    assert "the frozen weights that it refers to are missing" in outcome.error_lines[-1]


def test_a_moved_run_goes_on_and_a_flattened_checkpoint_stands_alone(
    recipe: Path, straight: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    run = half(recipe, "moved")
    shutil.move(run, tmp_path / "elsewhere")
    train(recipe, f"run.root={tmp_path}", "run.name=elsewhere")
    assert learnt(tmp_path / "elsewhere") == learnt(straight)

    alone = tmp_path / "alone"
    assert run_command("inspect", str(straight), "--self-contained", str(alone)).out.strip() == str(alone)
    assert run_command("inspect", str(alone), "--verify").out == f"{alone}: whole\n"
    assert differences(stored(alone), stored(checkpoint(straight, STEPS))) == []
    later = make_recipe(tmp_path, "stage1", init={"from": str(alone)})
    (outcome,) = train(later, "train.steps=1")
    assert f"from {alone}: loaded" in outcome.err
    bare = Path(shutil.copytree(checkpoint(straight, STEPS), tmp_path / "bare"))
    outcome = run_command("inspect", str(bare), "--verify", code=1)
    assert "the frozen weights that it refers to are missing" in outcome.out
    outcome = run_command("inspect", str(straight), "--self-contained", str(alone), code=2)
    assert "exists already" in outcome.error_lines[-1]


def test_inspect_verify_names_what_is_wrong_with_each(recipe: Path) -> None:
    run = half(recipe, "verified")
    outcome = run_command("inspect", str(run), "--verify")
    assert outcome.out == f"{checkpoint(run, 4)}: whole\n{checkpoint(run, 2)}: whole\n"
    flip(checkpoint(run, 2) / "optimizer" / "__0_0.distcp")
    outcome = run_command("inspect", str(run), "--verify", code=1)
    good, bad = outcome.out.splitlines()
    assert good == f"{checkpoint(run, 4)}: whole"
    assert bad.startswith(f"{checkpoint(run, 2)}: optimizer/__0_0.distcp is damaged: SHA-256 ")
    printed = run_command("inspect", str(run)).out
    assert "frozen weights" in printed and "frozen/" in printed.replace("\n", "")


def test_a_full_disk_stops_the_run_in_time_and_the_same_command_mends_it(recipe: Path, straight: Path) -> None:
    """No file may grow beyond 20 kB, so no shard can be written; the checkpoints up to step 4 stay intact."""
    run = half(recipe, "full")
    argv = ["train", str(recipe), "run.name=full", "train.save_every=2"]
    (outcome,) = run_ranks(1, full_disk_command, argv, 20_000)
    assert outcome.value == 1
    assert "the checkpoint of step 6 failed (rank 0: File too large" in outcome.err
    assert "Training goes on" in outcome.err
    message = next(line for line in outcome.error_lines if line.startswith("emma-train train: "))
    assert "no checkpoint could be written since step 6" in message
    assert "it goes on from step 4" in message
    assert "Traceback" not in outcome.err
    assert not list((run / "checkpoints").glob("*.tmp"))
    train(recipe, "run.name=full")
    assert learnt(run) == learnt(straight)
    assert differences(stored(checkpoint(run, STEPS)), stored(checkpoint(straight, STEPS))) == []


def test_the_last_few_every_nth_and_the_best_are_kept(recipe: Path) -> None:
    settings = ("train.save_every=1", "train.keep=1", "train.keep_every=3", "train.keep_best=loss")
    train(recipe, "run.name=kept", *settings)
    losses = {line["step"]: line["loss"] for line in metrics(recipe.parent / "kept")}
    best = min(losses, key=lambda step: losses[step])
    kept = {path.name for path in folders.list_steps(recipe.parent / "kept" / "checkpoints")}
    assert kept == {folders.step_name(step) for step in (3, 6, STEPS, best)}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.keep_every=3"], "train.keep_every is 3, no multiple of train.save_every (2)"),
        (["train.keep_best=loss/t2i"], "t2i is not in the mix"),
        (["train.keep_best=accuracy"], "train.keep_best is 'accuracy'"),
        (["train.keep_best=loss", "train.log_every=5"], "lower train.log_every (5)"),
    ],
)
def test_what_cannot_be_kept_is_told_before_training(recipe: Path, overrides: list[str], said: str) -> None:
    (outcome,) = train(recipe, "run.name=never", *overrides, code=2)
    (line,) = outcome.error_lines
    assert said in line


def test_a_resume_goes_on_with_the_tracker_s_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, tracker = recipe.parent / "tracked", "tracker.kind=wandb"
    train_until(recipe, 4, "run.name=tracked", tracker)
    first = (folders.read_valid_meta(checkpoint(run, 4)) or {})["tracker_run"]
    train(recipe, "run.name=tracked", tracker)
    assert first and (folders.read_valid_meta(checkpoint(run, STEPS)) or {})["tracker_run"] == first
    assert len(list((run / "wandb").glob(f"offline-run-*-{first}"))) == 2


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_torchrun_restarts_into_a_resume(recipe: Path, tmp_path: Path) -> None:
    """A rank is killed; torchrun restarts both, and they resume from the last checkpoint."""
    steps = "train.steps=14"
    train(recipe, "run.name=unbroken", steps, processes=2)
    run, log = recipe.parent / "restarted", tmp_path / "log"
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "emma_train"]
    words += ["train", str(recipe), "run.name=restarted", steps]
    environment = {**os.environ, **torchrun_environment(1), "OMP_NUM_THREADS": "1", SHORT_WAITS_VARIABLE: "1"}
    agent = fork_server().Process(target=run_agent, args=(words, environment, str(ROOT), str(log), ""))
    agent.start()
    assert agent.pid is not None
    try:
        deadline = time.monotonic() + 90
        while steps_logged(run) < 5:
            assert agent.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        agent.join(120)
    finally:
        kill_all(agent.pid)
    assert agent.exitcode == 0, log.read_text()
    assert log.read_text().count("resumed ") == 1
    assert learnt(run) == learnt(recipe.parent / "unbroken")
    ends = [stored(checkpoint(recipe.parent / name, 14)) for name in ("restarted", "unbroken")]
    assert differences(*ends) == []


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
