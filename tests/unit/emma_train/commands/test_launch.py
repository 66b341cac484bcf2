"""The launch command, up to the script that it would submit."""

from pathlib import Path

import pytest

from emma_train.cli import main
from tests.helpers import ROOT

RECIPE = str(ROOT / "recipes" / "tiny" / "stage0.yaml")
JOB = ["--on", "slurm", "--gpus-per-node", "0", "--dry-run", "--array", "0-2"]


@pytest.mark.parametrize("name", ["seed-{array}", "{array}"])
def test_each_run_of_an_array_has_its_number(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["launch", RECIPE, *JOB, f"run.root={tmp_path}", f"run.name={name}", "data.seed={array}"]) == 0
    script = capsys.readouterr().out
    number = "'\"$SLURM_ARRAY_TASK_ID\"'"
    assert f"--run '{tmp_path / name}' ".replace("{array}", number) in script
    assert f"'run.name={name}' 'data.seed={{array}}'".replace("{array}", number) in script
