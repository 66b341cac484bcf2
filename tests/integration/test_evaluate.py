"""evaluate of a model that learned nothing: every file is written, and nothing is right by chance alone."""

import json
from pathlib import Path

import pytest

from data_pipelines.emoji.build import BuildSettings, build_set, provenance
from data_pipelines.emoji.concepts import Amounts, EmojiWorld
from data_pipelines.emoji.drawings import read_catalogue
from data_pipelines.shards.build_index import index_folder
from emma_train.cli import main
from tests.drawings import GROUPS, write_package
from tests.helpers import ASSETS, tiny_recipe, write_export


def write_world(folder: Path) -> Path:
    """A small world of scenes in three splits, with a sheet of its drawings."""
    package = write_package(folder / "package")
    amounts = Amounts(12, 12, 4, scenes=12)
    world = EmojiWorld("toy", frozenset(GROUPS), None, amounts, amounts, amounts, scene_captions=True)
    catalogue, settings, out = (
        read_catalogue(package, package / "data-by-emoji.json"),
        BuildSettings(),
        folder / "world",
    )
    with pytest.MonkeyPatch.context() as patch:
        for share in ("CONCEPT_SHARE", "DRAWING_SHARE"):
            patch.setattr(f"data_pipelines.emoji.splits.{share}", 0.3)
        for split in build_set(catalogue, world, out, settings):
            index_folder(
                out / split, ASSETS / "tokenizer" / "tokenizer.json", provenance(catalogue, world, settings, split)
            )
    return out


@pytest.mark.slow
def test_evaluate_writes_scores_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_export(tmp_path / "export", tiny_recipe("stage3"))
    data, out = write_world(tmp_path), tmp_path / "out" / "scores.json"
    assert main(["evaluate", str(tmp_path / "export"), "--data", str(data), "--limit", "16", "--out", str(out)]) == 0
    scores = json.loads(out.read_text())["scores"]
    assert all(score["stderr"] > 0 and score["num"] > 0 for score in scores)
    stem = next(score for score in scores if score["name"] == "answer: stem" and score["split"] == "heldout_stem")
    assert stem["num"] >= 400 and stem["value"] < 0.1
    results = json.loads((out.parent / "scores" / "results.json").read_text())
    assert results["config"]["checkpoint_digest"] and results["git_hash"] and results["n-samples"]
    lines = [json.loads(line) for line in (out.parent / "scores" / "samples.jsonl").read_text().splitlines()]
    drawn = [line for line in lines if line["doc"]["task"] in ("t2i", "it2i")]
    assert len(drawn) == 2 * (16 + 12) and not any(line.get("all") or line.get("both") for line in drawn)
    assert (out.parent / "scores" / "sheet.png").stat().st_size > 1000
    assert "heldout_stem" in capsys.readouterr().out
