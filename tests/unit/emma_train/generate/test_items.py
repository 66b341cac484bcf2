"""Standard errors of scores, and the forms in which results are written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_train.generate.items import EvaluationItem, cluster_stderr, share_scores, share_stderr
from emma_train.generate.results import write_results


def test_clusters_of_one_value_give_the_usual_standard_error() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert cluster_stderr(values, range(5)) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_values_that_always_agree_count_as_one() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    twice = [value for value in values for _ in range(2)]
    assert cluster_stderr(twice, [n // 2 for n in range(10)]) == pytest.approx(cluster_stderr(values, range(5)))


def test_the_standard_error_covers_what_it_should() -> None:
    """Over many simulated evaluations the mean lies within two standard errors of the truth in about 95 %."""
    rng = np.random.default_rng(0)
    clusters, inside = [n // 3 for n in range(180)], 0
    for _ in range(400):
        chances = rng.beta(2, 2, 60).repeat(3)
        values = (rng.random(180) < chances).astype(float).tolist()
        inside += abs(np.mean(values) - 0.5) < 2 * share_stderr(values, clusters)
    assert 0.92 < inside / 400 < 0.98


def test_all_right_is_not_certain() -> None:
    assert share_stderr([1.0] * 19, list(range(19))) == 1 / 20


def items(kind: str, count: int) -> list[EvaluationItem]:
    image = np.full((32, 32, 3), 200, np.uint8)
    made = [
        EvaluationItem("held", "t2i", kind, f"r{n}/0", "a cat", n, {"object": n % 4 == 0, "all": False}, image=image)
        for n in range(count)
    ]
    made[0].baseline = {"object": True}
    return made


def test_scores_by_kind_and_metric_without_small_kinds() -> None:
    scores = share_scores([*items("single", 20), *items("two", 3)], "share", "image")
    assert [(s["name"], s["value"], s["num"]) for s in scores] == [
        ("image, single: object", 0.25, 20),
        ("image, single: all", 0.0, 20),
    ]
    assert scores[0]["baseline"] == 0.05 and scores[0]["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 19))


def test_written_results(tmp_path: Path) -> None:
    made = items("single", 20)
    scores = [*share_scores(made, "share", "image")]
    scores.append({**scores[0], "metric": "other", "value": math.nan, "bar": 0.5})
    write_results(tmp_path / "scores", scores, made, {"git_hash": "abc", "config": {"step": 3}})
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    entry = results["results"]["held_t2i_single"]
    assert entry["object,none"] == 0.25 and entry["object_stderr,none"] > 0 and entry["other,none"] is None
    assert results["n-samples"]["held_t2i_single"] == {"original": 20, "effective": 20}
    assert results["higher_is_better"]["held_t2i_single"]["object"] is True
    assert results["bar"]["held_t2i_single"] == {"object": None, "all": None, "other": 0.5}
    assert (results["git_hash"], results["config"]) == ("abc", {"step": 3})
    lines = [json.loads(line) for line in (tmp_path / "scores" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and lines[1]["reason"] == "wrong: object, all" and lines[0]["doc"]["prompt"] == "a cat"
    assert Image.open(tmp_path / "scores" / "sheet.png").width == 12 * 104
    assert (tmp_path / "scores" / "results").with_suffix(".md").read_text().count("\n") == 7
