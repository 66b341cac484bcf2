"""The model card is read back with the hub's own reader."""

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from emma_train.errors import UserError
from emma_train.evaluate.model_card import BEGIN, CARD_FILE, END, write_card

META = {"stage": "stage3", "step": 200}
CONFIG = {"limit": 96, "ema": True, "experts": True}


def score(name: str, value: float, split: str = "heldout_drawings", metric: str = "exact_match") -> dict[str, Any]:
    return {"split": split, "name": name, "metric": metric, "value": value, "stderr": 0.03, "num": 96, "unit": "share"}


def card_of(export: Path) -> ModelCard:
    return ModelCard.load(export / CARD_FILE)


def results(export: Path) -> dict[str | None, Any]:
    return {result.metric_name: result for result in card_of(export).data.eval_results or []}


def test_scores_are_read_back(tmp_path: Path) -> None:
    scores = [score("answer: group", 0.651), score("image, scene: all", 0.25), score("edit, any: both", 0.11)]
    path = write_card(tmp_path, "emoji", scores, CONFIG, META, 3_400_000)
    by_name = results(tmp_path)
    assert {name: result.metric_value for name, result in by_name.items()} == {s["name"]: s["value"] for s in scores}
    tasks = ["image-text-to-text", "text-to-image", "image-to-image"]
    assert [result.task_type for result in by_name.values()] == tasks
    assert by_name["answer: group"].metric_args == {"stderr": 0.03, "n": 96, "unit": "share"}
    assert by_name["answer: group"].dataset_args == CONFIG
    assert "Stage stage3, step 200,\n3.4 million parameters" in path.read_text()
    assert "| heldout drawings | answer: group | 0.651 | 0.03 | 96 | share |" in path.read_text()


def test_an_evaluation_replaces_its_earlier_scores_and_keeps_those_of_others(tmp_path: Path) -> None:
    write_card(tmp_path, "emoji", [score("answer: group", 0.5), score("answer: place", 0.8)], CONFIG, META, 1)
    write_card(tmp_path, "geneval", [score("overall: mean", 0.9, "geneval", "mean")], CONFIG, META, 1)
    path = write_card(tmp_path, "emoji", [score("answer: group", 0.6)], CONFIG, META, 1)
    assert {name: r.metric_value for name, r in results(tmp_path).items()} == {
        "overall: mean": 0.9,
        "answer: group": 0.6,
    }
    assert path.read_text().count("| answer: group |") == 1
    again = path.read_bytes()
    write_card(tmp_path, "emoji", [score("answer: group", 0.6)], CONFIG, META, 1)
    assert path.read_bytes() == again


def test_what_an_author_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(
        "---\nlicense: apache-2.0\ntags: [fast]\n---\n# Emma the second\n\nTrained with care.\n"
    )
    path = write_card(tmp_path, "gedit", [score("en: overall", 6.5, "gedit", "overall")], CONFIG, META, 1)
    card, text = card_of(tmp_path), path.read_text()
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["fast"]
    assert "# Emma the second\n\nTrained with care.\n" in text
    assert text.index("Trained with care") < text.index(BEGIN) < text.index(END)
    assert results(tmp_path)["en: overall"].task_type == "image-to-image"


def test_a_value_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    write_card(tmp_path, "emoji", [score("answer: group", math.nan), score("answer: place", 0.8)], CONFIG, META, 1)
    assert list(results(tmp_path)) == ["answer: place"]


@pytest.mark.parametrize("header", ["tags: [", "model-index:\n- name: x\n  results: [{}]", "- a\n- list"])
def test_a_header_that_cannot_be_read_is_named_and_left(header: str, tmp_path: Path) -> None:
    text = f"---\n{header}\n---\n# Mine\n"
    (tmp_path / CARD_FILE).write_text(text)
    with pytest.raises(UserError, match=r"README\.md: its header cannot be read"):
        write_card(tmp_path, "emoji", [score("answer: group", 0.5)], CONFIG, META, 1)
    assert (tmp_path / CARD_FILE).read_text() == text
