"""The model in recipes/tiny-long/model, by its name, and what the README says of its scores."""

import json
import re

import pytest

from emma_train.cli import main
from emma_train.evaluate.compare_scores import read_scores_file
from tests.distributed.spawn import ROOT

SCORES = ROOT / "recipes" / "tiny-long" / "scores.json"


def test_it_answers_by_its_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    image = ["--image", "docs/images/cat.png"]
    questions = ["What is this?", "Which group is this?"]
    assert main(["generate", "tiny", "--task", "i2t", *image, "--prompt", *questions]) == 0
    assert capsys.readouterr().out.splitlines() == ["cat face", "animals & nature"]


def test_it_is_small_and_its_scores_are_of_its_last_step() -> None:
    files = [path for path in (ROOT / "recipes" / "tiny-long" / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    meta = json.loads((ROOT / "recipes" / "tiny-long" / "model" / "meta.json").read_text())
    scored = json.loads(SCORES.read_text())
    assert (scored["stage"], scored["step"]) == (meta["stage"], meta["step"])


def test_the_readme_states_its_scores() -> None:
    values = {(score["split"], score["name"]): score["value"] for score in read_scores_file(SCORES)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for words, name in {
        "object": "image, single: object",
        "edits that are done and keep the rest": "edit, any: both",
        '"which group?"': "answer: group",
        '"what is this?"': "answer: concept",
        "formulas and charts": "answer: stem",
    }.items():
        [stated] = re.findall(rf"^\|[^|]*{re.escape(words)}[^|]*\| \**([0-9.]+) %", readme, re.MULTILINE)
        assert float(stated) == round(100 * values["heldout_drawings", name], 1), words
