"""Scores beside earlier ones of the same model."""

import json
from pathlib import Path
from typing import Any

import pytest

from emma_train.errors import UserError
from emma_train.evaluate.compare_scores import compare_scores, describe_differences, read_scores_file


def score(name: str, value: float, num: int = 1000) -> dict[str, Any]:
    return {"split": "heldout_drawings", "name": name, "value": value, "num": num}


def test_equal_scores_are_counted() -> None:
    scores = [score("answer: group", 0.7), score("velocity loss: t2i", 0.301)]
    assert compare_scores(scores, scores) == ("2 of 2 scores are equal to the last digit", [])


def test_a_score_may_differ_by_a_hundredth_or_by_one_item() -> None:
    earlier = [score("answer: group", 0.7), score("edit, any: both", 0.5, num=32), score("answer: stem", 0.8)]
    near = [score("answer: group", 0.7099), score("edit, any: both", 0.53125, num=32), score("answer: stem", 0.8)]
    line, wrong = compare_scores(near, earlier)
    assert line == "1 of 3 scores are equal to the last digit; the others differ by at most 0.0312"
    assert wrong == []
    far = [score("answer: group", 0.711), score("edit, any: both", 0.5625, num=32), score("answer: stem", 0.8)]
    assert compare_scores(far, earlier)[1] == [
        "heldout_drawings answer: group is 0.7110, not 0.7000",
        "heldout_drawings edit, any: both is 0.5625, not 0.5000",
    ]


def test_a_score_that_is_no_number_or_in_one_file_alone_is_a_difference() -> None:
    _, wrong = compare_scores([score("a", float("nan")), score("c", 1)], [score("a", 0.5), score("b", 0.5)])
    assert wrong == [
        "heldout_drawings a is nan, not 0.5000",
        "heldout_drawings b is missing",
        "heldout_drawings c is new",
    ]
    shown = describe_differences([str(n) for n in range(7)], Path("scores.json"))
    assert shown == "7 scores are not those of scores.json: 0; 1; 2; 3; 4 and 2 more"


@pytest.mark.parametrize("text", ["", "[]", '{"scores": [1]}', '{"scores": [{"value": "x"}]}'])
def test_a_file_without_scores_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"scores\.json: is not a scores\.json of emma-train evaluate"):
        read_scores_file(path)
    path.write_text(json.dumps({"scores": [score("a", 1.0)]}))
    assert read_scores_file(path) == [score("a", 1.0)]
