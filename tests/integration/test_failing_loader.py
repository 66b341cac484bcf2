"""A run never hangs without a word: what fails in a loader worker, in the trainer or in the machine ends it with one
line that says what to do, and exit code 1 on all ranks."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.failing import diverging_command, failing_command, small_disk_command
from tests.distributed.spawn import Outcome, run_ranks
from tests.integration.conftest import MakeRecipe

NO_NAMESPACE = (
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-m", "sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm"], capture_output=True
    ).returncode
)


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(
        tmp_path_factory.mktemp("failing"),
        train={"steps": 9, "save_every": 99},
        data={"slots": 4, "samples_per_step": 8, "workers": 1, "prefetch": 2},
    )


def one_line(outcomes: list[Outcome]) -> str:
    """The line of a run that ended with exit code 1 on all ranks."""
    for outcome in outcomes:
        assert outcome.value == 1, outcome.err
        assert "Traceback" not in outcome.err
    lines = [line for outcome in outcomes for line in outcome.error_lines if line.startswith("emma-train train: ")]
    assert lines and len(set(lines)) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("worker", "bug", "step 1: the loader failed: TypeError: unforeseen (failing.py, line "),
        ("trainer", "files", "step 3: this process has too many files open: raise `ulimit -n`"),
        ("builder", "files", "this process has too many files open: raise `ulimit -n`"),
        ("builder", "memory", "has no memory left: give it more, or lower data.workers or data.prefetch"),
    ],
)
def test_an_error_on_one_rank_ends_all_of_them_with_one_line(recipe: Path, where: str, kind: str, message: str) -> None:
    argv = ["train", str(recipe), f"run.name={where}-{kind}"]
    outcomes = run_ranks(2, failing_command, argv, where, kind, timeout_s=60)
    assert message in one_line(outcomes)
    assert not (recipe.parent / f"{where}-{kind}" / "bad_samples.jsonl").exists()


@pytest.mark.skipif(bool(NO_NAMESPACE), reason="may not mount a file system over /dev/shm")
def test_a_small_dev_shm_is_named(recipe: Path) -> None:
    argv = ["train", str(recipe), "run.name=shm"]
    line = one_line(run_ranks(1, small_disk_command, argv, "/dev/shm", "64k", ":"))
    assert "/dev/shm is full" in line and "--shm-size" in line


@pytest.mark.parametrize(("saved", "start"), [(2, "goes on from step-00000002"), (99, "goes on from the beginning")])
def test_a_run_that_diverges_says_what_to_do(recipe: Path, saved: int, start: str) -> None:
    argv = ["train", str(recipe), f"run.name=diverges-{saved}", "data.workers=0", f"train.save_every={saved}"]
    outcomes = run_ranks(2, diverging_command, [*argv, "train.max_skipped_steps=2", "train.save_async=false"], 2)
    line = one_line(outcomes)
    assert "training has diverged: 2 steps in a row" in line and start in line and "lower optimizer.lr" in line
    assert sum("emma-train train: " in outcome.err for outcome in outcomes) == 1
