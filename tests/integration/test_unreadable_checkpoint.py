"""A checkpoint that cannot be read for a moment is not damaged: the run stops, and nothing is set aside. What changed
in the code since it was written is told."""

import errno
import os
import tarfile
from pathlib import Path

import pytest

from emma_train.training.resume_rule import code_change
from tests.distributed.failing import unreadable_command
from tests.distributed.spawn import run_ranks
from tests.helpers import ROOT

FIXTURE = ROOT / "tests" / "assets" / "e0297de"
STEP = "step-00000004"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE / "micro.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "micro"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("weights/__0_0.distcp", errno.EACCES),
        ("weights/__0_0.distcp", errno.EIO),
        ("optimizer/__0_0.distcp", errno.ESTALE),
        ("optimizer/__0_0.distcp", errno.EMFILE),
    ],
)
def test_a_file_that_one_rank_cannot_read_stops_all_and_sets_nothing_aside(run: Path, name: str, number: int) -> None:
    argv = ["train", str(FIXTURE / "recipe.yaml"), f"run.root={run.parent}"]
    for outcome in run_ranks(2, unreadable_command, argv, name, number, timeout_s=60):
        assert outcome.value == 1, outcome.err
        assert f"{STEP}/{name} cannot be read on " in outcome.error_lines[-1]
        assert os.strerror(number) in outcome.error_lines[-1]
        assert "Traceback" not in outcome.err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", STEP]


@pytest.mark.parametrize("command", ["resume", "inspect", "verify", "export"])
def test_metadata_that_cannot_be_read_is_named(run: Path, tmp_path: Path, command: str) -> None:
    argv = {
        "resume": ["train", str(FIXTURE / "recipe.yaml"), f"run.root={run.parent}"],
        "inspect": ["inspect", str(run)],
        "verify": ["inspect", str(run), "--verify"],
        "export": ["export", str(run), str(tmp_path / "out")],
    }[command]
    (outcome,) = run_ranks(1, unreadable_command, argv, f"{STEP}/meta.json", errno.EACCES)
    assert outcome.value == 1, outcome.err
    assert f"{STEP}/meta.json cannot be read on " in outcome.error_lines[-1]
    assert (run / "checkpoints" / STEP).is_dir()


def test_another_commit_is_told_in_one_line() -> None:
    assert code_change({}, "a") == code_change({"commit": "a"}, None) == code_change({"commit": "a"}, "a") == ""
    assert code_change({"commit": "a"}, "b") == (
        "the code is that of commit b now, and was a when the checkpoint was written"
    )
    assert code_change({"commit": "a"}, "a+").endswith("(+ means changes that no commit holds)")
    assert "they may differ" in code_change({"commit": "a+"}, "a+")
