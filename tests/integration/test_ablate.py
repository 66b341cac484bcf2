"""An ablation as a user runs it: paired runs, one line for each, nothing twice, and no line of another recipe."""

import json
from pathlib import Path

import pytest
import yaml

from tests.distributed.spawn import run_command
from tests.helpers import recipe_values, write_recipe

METRIC = "val/loss/t2i"


@pytest.mark.slow
def test_arms_are_paired_and_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    split = {"sources": recipe_values()["data"]["sources"], "every": 2, "num_samples": 4}
    write_recipe(tmp_path / "recipe.yaml", {**recipe_values(train__steps=2), "validate": split})
    arms = {"emma": {}, "zeros": {"set": {"model.placeholder": "zeros"}}}
    values = {"recipe": "recipe.yaml", "seeds": [0, 1], "metrics": [METRIC], "arms": arms, "out": str(tmp_path / "out")}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = ["ablate", str(tmp_path / "ablation.yaml"), "--root", str(tmp_path / "runs"), "--jobs", "2"]

    table = run_command(*command).out
    lines = (tmp_path / "out").read_text().splitlines()
    results = {(line["arm"], line["seed"]): line["metrics"][METRIC] for line in map(json.loads, lines)}
    assert sorted(results) == [("emma", 0), ("emma", 1), ("zeros", 0), ("zeros", 1)]
    assert len(set(results.values())) == 4
    differences = [results["zeros", seed] - results["emma", seed] for seed in (0, 1)]
    assert f"({sum(differences) / 2:+.4f} ± {abs(differences[0] - differences[1]) / 2:.4f})" in table

    texts = {run.name: (run / "digests.jsonl").read_text().split("\n") for run in runs(tmp_path)}
    data = {name: [json.loads(row)["data/digest"] for row in rows if row] for name, rows in texts.items()}
    by_seed = [[d for name, d in data.items() if name.endswith(f"seed{seed}")] for seed in (0, 1)]
    assert by_seed[0][0] == by_seed[0][1] and by_seed[1][0] == by_seed[1][1] and by_seed[0][0] != by_seed[1][0]

    (tmp_path / "out").write_text("\n".join(lines[1:]) + "\n")
    changed = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs(tmp_path)}
    assert run_command(*command).out == table
    assert sorted((tmp_path / "out").read_text().splitlines()) == sorted(lines)
    assert changed == {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs(tmp_path)}

    refused = run_command(*command, "train.steps=3", code=2).error_lines[-1]
    assert "recipe" in refused and str(tmp_path / "out") in refused


def runs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "runs").iterdir() if (path / "digests.jsonl").exists())
