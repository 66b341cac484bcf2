"""A stage starts from a checkpoint of its own stage."""

import tarfile
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from tests.helpers import ROOT
from tests.runs import checkpoint, train

FIXTURE = ROOT / "tests" / "assets" / "e0297de"
RECIPE = FIXTURE / "recipe.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of stage 1 that was stopped at step 4, by an older version."""
    with tarfile.open(FIXTURE / "micro.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "micro"


def test_a_stage_starts_from_its_own_stage_with_other_settings(run: Path) -> None:
    start = (f"run.root={run.parent}", f"init.from={run}", "run.name=warm", "train.steps=1")
    (outcome,) = train(RECIPE, *start, "optimizer.lr=2e-4")
    assert "stage1 starts from a checkpoint of stage1 itself: its weights only, at step 0" in outcome.err
    meta = folders.read_meta(checkpoint(run.parent / "warm", 1)) or {}
    assert (meta["stage"], meta["parent"]["stage"], meta["parent"]["step"]) == ("stage1", "stage1", 4)
    assert meta["commit"] is None or len(meta["commit"].rstrip("+")) == 12
