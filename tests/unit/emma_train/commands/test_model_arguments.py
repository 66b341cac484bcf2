"""The name of a shipped model, as commands take it."""

from pathlib import Path

import pytest

from emma_train.commands.model_arguments import SHIPPED, shipped_or_given


def test_a_name_is_the_shipped_model_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_or_given("tiny") == SHIPPED["tiny"]
    assert shipped_or_given("runs/tiny") == "runs/tiny"
    (tmp_path / "tiny").mkdir()
    assert shipped_or_given("tiny") == "tiny"
