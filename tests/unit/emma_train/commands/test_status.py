"""`emma-train status --next-samples` names what the loader reads next."""

import json
from pathlib import Path

import pytest

from data_pipelines.loader.loader import Stream
from emma_train.cli import main
from emma_train.config.load import load_recipe
from tests.helpers import recipe_values, write_recipe


@pytest.mark.parametrize(("log_every", "steps"), [(1, [3]), (5, [3, 4])])
def test_the_next_steps_are_those_that_the_loader_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log_every: int, steps: list[int]
) -> None:
    values = recipe_values(train__log_every=log_every, data__workers=0)
    recipe = load_recipe(write_recipe(tmp_path / "config.yaml", values))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2)))
    assert main(["status", str(tmp_path), "--next-samples"]) == 0
    read = [
        f"step {batches.step}: {' '.join(key for pack in batches.packs for key in pack.keys)}"
        for batches in Stream(recipe, 0, 1, None).steps(steps[0], steps[-1])
    ]
    assert capsys.readouterr().out.splitlines() == read
    assert len(read) == len(steps)


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path), "--next-samples"]) == 2
    assert "holds no run" in capsys.readouterr().err
