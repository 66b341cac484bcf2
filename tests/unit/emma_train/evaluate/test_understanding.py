"""The table of benchmarks against the paper's mean and the documentation."""

import pytest

from emma_train.evaluate.understanding import PAPER_MEAN, UNDERSTANDING, mean_score
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
