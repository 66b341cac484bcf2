"""The table of benchmarks against the paper's mean and the documentation."""

import json
from pathlib import Path

import pytest

from emma_train.evaluate.understanding import PAPER_MEAN, UNDERSTANDING, main, mean_score
from tests.helpers import ROOT


def test_the_scores_of_the_paper_have_its_mean() -> None:
    scores = {benchmark.name: benchmark.paper for benchmark in UNDERSTANDING}
    assert len(scores) == 11 and round(mean_score(scores), 1) == PAPER_MEAN
    with pytest.raises(ValueError, match="no score of MMVet"):
        mean_score({name: score for name, score in scores.items() if name != "MMVet"})


def test_the_documentation_has_the_same_table() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for b in UNDERSTANDING:
        line = f"| {b.name} | {b.paper} | `{b.vlmevalkit}` | `{b.lmms_eval}` | {b.split} | {b.metric} | {b.judge} |"
        assert line.replace("|  |", "| |") in text, line


def status(folder: Path, metrics: dict[str, tuple[str, float]]) -> Path:
    """status.json as ms-vlmeval 0.0.20 writes it: multiple choice as a share, VQA in per cent, OCRBench of 1,000."""
    datasets = {name: {"primary_metric": key, "metrics": {key: value}} for name, (key, value) in metrics.items()}
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"datasets": {**datasets, "Other": {"status": "infer_done"}}}))
    return folder / "status.json"


def test_runs_with_and_without_experts_stand_beside_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {"MMStar": ("split=none|Overall", 0.48), "ChartQA_TEST": ("Overall", 42.5), "OCRBench": ("Final Score", 890)}
    every = {b.vlmevalkit: ("Overall", b.paper / b.percent) for b in UNDERSTANDING}
    paths = [status(tmp_path / "emma", every), status(tmp_path / "emma-no-experts", some)]
    assert main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| benchmark | paper | emma | emma-no-experts |"
    assert "| MMStar | 64.8 | 64.8 | 48.0 |" in lines and "| OCRBench | 89.0 | 89.0 | 89.0 |" in lines
    assert "| ChartQA | 88.0 | 88.0 | 42.5 |" in lines and "| MMVet | 73.0 | 73.0 |  |" in lines
    assert lines[-1].startswith("| mean | 79.6 (79.2 without experts) | 79.6 | no score of MMBench, MMMU, MMVet,")
    (tmp_path / "emma" / "status.json").write_text("{")
    assert main([str(paths[0])]) == main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2
