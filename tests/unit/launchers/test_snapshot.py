"""A job's copy of the code and of its recipe: complete, and of no later edit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import launchers
from emma_train.config.load import load_stages, recipe_files, to_yaml
from emma_train.errors import UserError
from launchers.snapshot import COPIED, take_snapshot

ROOT = Path(launchers.__file__).parents[1]
PIPELINE = ROOT / "recipes" / "tiny" / "pipeline.yaml"


def test_the_copied_recipe_is_the_recipe(tmp_path: Path) -> None:
    files = recipe_files(PIPELINE)
    assert {file.name for file in files} == {
        "pipeline.yaml", "base.yaml", "stage0.yaml", "stage1.yaml", "stage2.yaml", "stage3.yaml",
        "stage4_expert.yaml", "stage4_router.yaml",
    }  # fmt: skip
    copied = take_snapshot(tmp_path, PIPELINE, files, {}).recipe
    assert copied != PIPELINE
    theirs, ours = ([to_yaml(recipe) for _, recipe in load_stages(file)] for file in (PIPELINE, copied))
    assert theirs == ours


def test_files_of_a_recipe_keep_their_places_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "base.yaml").write_text("train: {steps: 3}\n")
    recipe = tmp_path / "mine" / "deep" / "run.yaml"
    recipe.write_text(f"extends: {Path('..', '..', 'shared', 'base.yaml')}\n")
    snapshot = take_snapshot(tmp_path / "run", recipe, recipe_files(recipe), {"command": ["x"]})
    recipe.write_text("extends: none.yaml\n")
    assert [file.name for file in recipe_files(snapshot.recipe)] == ["run.yaml", "base.yaml"]
    assert json.loads((snapshot.folder / "launch.json").read_text())["command"] == ["x"]


def test_the_copied_code_runs_instead_of_the_current_one(tmp_path: Path) -> None:
    snapshot = take_snapshot(tmp_path, PIPELINE, [PIPELINE], {})
    assert not list(snapshot.code.rglob("*.pyc"))
    program = "import emma_train, data_pipelines, launchers; from emma_train.training.environment import commit; " + (
        "print(*(m.__file__ for m in (emma_train, data_pipelines, launchers)), commit())"
    )
    environment = {"PYTHONPATH": str(snapshot.code), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    *files, commit = done.stdout.split()
    assert files == [str(snapshot.code / name / "__init__.py") for name in COPIED]
    assert commit == (snapshot.commit or "None")


def test_every_launch_has_a_folder(tmp_path: Path) -> None:
    folders = {take_snapshot(tmp_path, PIPELINE, [PIPELINE], {}).folder for _ in range(3)}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "launches"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"launch: .*file.*: cannot be written \(.*\); set run\.root"):
        take_snapshot(tmp_path / "file", PIPELINE, [PIPELINE], {})
