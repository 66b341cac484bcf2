"""Scores with standard errors; single facts are folded away; the contact sheet is in the page."""

from pathlib import Path

from PIL import Image

from emma_train.report.scores import scores_html, sheet_html


def test_single_facts_are_folded_and_errors_shown() -> None:
    scores = [
        {"name": "answer: group", "metric": "exact_match", "value": 0.6, "stderr": 0.031, "num": 229},
        {"name": "image, single: all", "metric": "all", "value": 0.25, "stderr": 0.05, "num": 96},
        {"name": "image, single: style", "metric": "style", "value": 0.5, "stderr": 0.05, "num": 96},
    ]
    shown, _, folded = scores_html(scores).partition("<details>")
    assert "± 0.031 · n 229" in shown and "image, single: all" in shown
    assert "image, single: style" in folded and "image, single: style" not in shown


def test_scores_without_facts_have_nothing_folded() -> None:
    assert "<details>" not in scores_html([{"name": "velocity", "value": 0.5}])


def test_a_sheet_is_in_the_page_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    assert sheet_html(path) == ""
    path.write_bytes(b"no image")
    assert sheet_html(path) == ""
    Image.new("RGB", (40, 40), "red").save(path)
    assert 'src="data:image/webp;base64,' in sheet_html(path)
