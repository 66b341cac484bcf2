"""A picture that cannot be read costs its sample and no more: skipped, counted, written out; past a limit it stops."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.spawn import run_command
from tests.integration.conftest import MakeRecipe
from tests.runs import learnt, metrics, train
from tests.shards import damage, every_task, png, write_shards

BROKEN = ("q003", "p005", "e007")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records of each task. Three cannot be read: overwritten after indexing, or indexed with half a picture."""
    contents = every_task(12, side=64)
    half = [(k, r, {"img0.png": png(1, 64)[:3000]} if k == "p005" else p) for k, r, p in contents]
    folder = write_shards(tmp_path_factory.mktemp("bad") / "set", half, per_shard=20)
    damage(folder / "shard-000000.tar", "q003.img0.png")
    damage(folder / "shard-000001.tar", "e007.img0.png")
    return folder


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, folder: Path) -> Path:
    """Each step is an epoch, so each meets all three."""
    data: dict[str, Any] = {"sources": [{"path": str(folder)}], "slots": 6, "samples_per_step": 36}
    return make_recipe(folder.parent, mix={"i2t": 1, "t2i": 1, "it2i": 1}, data=data)


def written(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_bad_samples_are_skipped_counted_and_written_out(recipe: Path, processes: int, workers: int) -> None:
    name = f"skip-{processes}-{workers}"
    outcome = train(recipe, f"run.name={name}", "train.steps=3", f"data.workers={workers}", processes=processes)[0]
    run = recipe.parent / name
    lines = metrics(run)
    assert [line["data/skipped"] for line in lines] == [3, 6, 9]
    assert [line["samples/i2t"] + line["samples/t2i"] + line["samples/it2i"] for line in lines] == [33] * 3
    found = written(run)
    assert sorted((bad["step"], bad["key"]) for bad in found) == sorted((s, k) for s in (1, 2, 3) for k in BROKEN)
    assert {bad["key"]: bad["task"] for bad in found} == {"q003": "i2t", "p005": "t2i", "e007": "it2i"}
    assert {bad["key"]: bad["shard"] for bad in found}["e007"] == "shard-000001.tar"
    assert "truncated" in next(bad["reason"] for bad in found if bad["key"] == "p005")
    assert "Traceback" not in outcome.err
    assert json.loads((run / "summary.json").read_text())["bad_samples"] == 9


def test_ranks_and_workers_do_not_change_what_is_learnt_from_the_rest(recipe: Path) -> None:
    for name, processes, workers in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1)):
        train(recipe, f"run.name=same-{name}", "train.steps=2", f"data.workers={workers}", processes=processes)
    a, b, c = (learnt(recipe.parent / f"same-{name}") for name in "abc")
    assert a == c
    for one, other in zip(a, b, strict=True):
        assert one["data/digest"] == other["data/digest"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_past_the_limit_the_run_stops_with_the_number_and_the_file(recipe: Path, processes: int) -> None:
    words = ["run.name=limit" + str(processes), "train.steps=5", "data.max_bad_samples=5"]
    outcome = train(recipe, *words, processes=processes, code=2)[0]
    last = outcome.error_lines[-1]
    assert "6 samples could not be read, more than data.max_bad_samples=5" in last
    assert "bad_samples.jsonl lists them" in last
    assert "Traceback" not in outcome.err
    run = recipe.parent / words[0].removeprefix("run.name=")
    assert len(written(run)) == 6
    assert len(metrics(run)) == 1


def test_the_count_goes_on_after_a_resume(recipe: Path) -> None:
    train(recipe, "run.name=resumed", "train.steps=2")
    train(recipe, "run.name=resumed", "train.steps=3")
    assert [line["data/skipped"] for line in metrics(recipe.parent / "resumed")] == [3, 6, 9]
    assert len(written(recipe.parent / "resumed")) == 9


def test_emma_data_check_finds_what_changed_and_what_cannot_be_opened(folder: Path) -> None:
    outcome = run_command("check", str(folder), module="data_pipelines", code=1)
    assert "record q003 differs from its crc32" in outcome.out
    assert "record e007 differs from its crc32" in outcome.out
