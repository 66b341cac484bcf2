"""Every key of docs/metrics.md in a run of two ranks, in metrics.jsonl and in W&B's own file."""

import re
from pathlib import Path

import pytest

from tests.helpers import ASSETS, ROOT, recipe_values, write_recipe
from tests.runs import metrics, train
from tests.shards import every_task, write_shards
from tests.wandb_file import history, wandb_runs

ELSEWHERE = {
    "loss/recon": "no reconstruction in this mix",
    "mfu": "no GPU",
    "vision/stem_share": "no STEM expert",
    "compile/recompiles": "not compiled",
    "health/spike": "no spike",
    "val/...": "docs/validation.md has the keys",
}
"""Documented keys that this run has not, and why."""


def documented_keys() -> list[str]:
    """The keys of the first table of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text().split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row)]


def pattern(key: str) -> str:
    """A documented key as a regular expression: words in capitals stand for a name."""
    return re.sub(r"[A-Z]{3,}", ".+", re.escape(key).replace(re.escape("..."), ".+"))


@pytest.mark.slow
def test_every_key_is_documented_and_every_documented_key_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    emoji, noise = str(ASSETS / "emoji" / "train"), str(write_shards(tmp_path / "noise", every_task(20), per_shard=10))
    settings = {"run__root": str(tmp_path), "run__name": "run", "tracker__kind": "wandb", "train__steps": 3}
    settings |= {"data__sources": [{"path": emoji, "weight": 1}, {"path": noise, "weight": 1}]}
    settings |= {"validate__every": 2, "validate__sources": [{"path": str(ASSETS / "emoji" / "heldout_drawings")}]}
    train(write_recipe(tmp_path / "recipe.yaml", recipe_values(**settings)), processes=2)

    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    logged = {key for row in rows for key in row}
    documented = documented_keys()
    assert len(documented) > 35
    assert [key for key in sorted(logged) if not any(re.fullmatch(pattern(d), key) for d in documented)] == []
    absent = {d for d in documented if not any(re.fullmatch(pattern(d), key) for key in logged)}
    assert absent == ELSEWHERE.keys() - {"val/..."}

    synced = history(wandb_runs(tmp_path / "run", ended=1))
    for row, sent in zip(rows, [row for row in synced if "loss" in row], strict=True):
        assert {key: sent.get(key) for key in row} == row

    for row in rows:
        for task in ("i2t", "t2i", "it2i"):
            by_source = [row.get(f"loss/{task}/{source}") for source in ("train", "noise")]
            values = [value for value in by_source if value is not None]
            assert values and min(values) <= row[f"loss/{task}"] * (1 + 1e-5)
            assert max(values) >= row[f"loss/{task}"] * (1 - 1e-5)
    assert rows[-1]["seen/tokens"] == sum(row["tokens/total"] for row in rows)
    assert rows[-1]["seen/samples"] == 36
    assert all(0 < row["goodput"] < 1 for row in rows)
