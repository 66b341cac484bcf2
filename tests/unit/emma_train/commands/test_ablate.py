"""The command of ablations: what a dry run says, which GPU a run gets, and what is read of a finished run."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from emma_train import cli
from emma_train.ablation.design import load_ablation, trials_of
from emma_train.ablation.results import result_of, scores_file
from emma_train.commands import ablate
from emma_train.errors import RunError
from tests.helpers import recipe_values, write_recipe


@pytest.fixture
def ablation(tmp_path: Path) -> Path:
    write_recipe(tmp_path / "recipe.yaml", recipe_values())
    arms = {"emma": {}, "full": {"set": {"model.und_attention": "full"}}}
    values = {"recipe": "recipe.yaml", "metrics": ["val/loss/i2t"], "evaluate": {"limit": 4}, "arms": arms}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return tmp_path / "ablation.yaml"


def test_a_dry_run_says_what_would_run(ablation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ablation.parent / "results.jsonl"
    assert cli.main(["ablate", str(ablation), "--out", str(out), "--dry-run", "train.steps=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("emma, seed 0: -m emma_train train ") and lines[0].count("model.und_attention") == 0
    assert lines[1].startswith("full, seed 0: ") and 'model.und_attention="full" train.steps=3' in lines[1]
    assert "| emma | 0 |" in "\n".join(lines) and not out.exists()


def test_results_need_a_file(ablation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate", str(ablation), "--dry-run"]) == 2
    assert "names no file for the results; add out, or give --out FILE" in capsys.readouterr().err


def test_runs_at_once_share_gpus_or_the_threads_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ablate._environments(3) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("0", "1", "0")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert ablate._environments(2) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("5", "3")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert ablate._environments(2) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_a_result_is_read_from_the_run(ablation: Path) -> None:
    [trial, _] = trials_of(load_ablation(ablation), str(ablation.parent / "runs"))
    with pytest.raises(RunError, match="cannot read what came out"):
        result_of(trial, 1.0)
    folder = trial.run_folder
    folder.mkdir(parents=True)
    rows = [
        {"step": 2, "seen/tokens": 100, "val/loss/i2t": 3.0, "val/time_s": 5.0, "loss": 1.0},
        {"step": 4, "seen/tokens": 210, "val/loss/i2t": 2.0, "val/answers": None},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "starts.jsonl").write_text('{"commit": "one"}\n{"commit": "two+"}\n')
    (folder / "environment.json").write_text('{"device": "a card"}')
    (folder / "summary.json").write_text('{"parameters": 77}')
    score = {"split": "held", "task": "t2i_single", "metric": "all", "value": 0.5}
    scores_file(trial).write_text(json.dumps({"scores": [score, {**score, "metric": "x", "value": None}]}))
    result = result_of(trial, 1e9)
    assert result.metrics == {"val/loss/i2t": 2.0, "held/t2i_single/all": 0.5}
    assert (result.arm, result.seed, result.commit, result.device) == ("emma", 0, "two+", "a card")
    assert (result.parameters, result.tokens, result.flops, result.seconds) == (77, 210, 1e9, 0)


@pytest.mark.seconds
@pytest.mark.parametrize("fusion", ["channel", "latent", "token"])
def test_flops_are_those_of_the_plan_for_all_steps(ablation: Path, fusion: str) -> None:
    def flops(*overrides: str) -> float:
        [trial, _] = trials_of(load_ablation(ablation, [f"model.fusion={fusion}", *overrides]), "runs")
        return ablate._flops(trial, "test")

    once = flops("train.steps=1")
    assert flops("train.steps=5") == 5 * once > 0
    if fusion != "channel":
        emma = ablate._flops(trials_of(load_ablation(ablation, ["train.steps=1"]), "runs")[0], "test")
        assert (once > emma) == (fusion == "token")
