"""A sample that cannot be read is replaced, counted and written out; past a limit all ranks stop together."""

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
    """Twelve records of each task. Three cannot be read: overwritten after indexing, or indexed with half an image."""
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
def test_bad_samples_are_replaced_counted_and_written_out(recipe: Path, processes: int, workers: int) -> None:
    name = f"skip-{processes}-{workers}"
    outcome = train(recipe, f"run.name={name}", "train.steps=3", f"data.workers={workers}", processes=processes)[0]
    run = recipe.parent / name
    lines = metrics(run)
    assert [line["data/replaced"] for line in lines] == [3, 6, 9]
    assert [line["data/skipped"] for line in lines] == [0, 0, 0]
    assert [[line[f"samples/{task}"] for task in ("i2t", "t2i", "it2i")] for line in lines] == [[12, 12, 12]] * 3
    listed = written(run)
    # A substitute that is broken too has a separate line.
    assert {(bad["step"], bad["key"]) for bad in listed} == {(s, k) for s in (1, 2, 3) for k in BROKEN}
    assert {bad["key"]: bad["task"] for bad in listed} == {"q003": "i2t", "p005": "t2i", "e007": "it2i"}
    assert {bad["key"]: bad["shard"] for bad in listed}["e007"] == "shard-000001.tar"
    assert all(bad["replaced_by"][0] == bad["key"][0] and bad["replaced_by"] not in BROKEN for bad in listed)
    assert "truncated" in next(bad["reason"] for bad in listed if bad["key"] == "p005")
    assert "Traceback" not in outcome.err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["bad_samples"], summary["replaced_samples"], summary["left_out_samples"]) == (len(listed), 9, 0)


def test_ranks_and_workers_do_not_change_what_is_learnt(recipe: Path) -> None:
    for name, processes, workers in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1)):
        train(recipe, f"run.name=same-{name}", "train.steps=2", f"data.workers={workers}", processes=processes)
    a, b, c = (learnt(recipe.parent / f"same-{name}") for name in "abc")
    assert a == c
    for one, other in zip(a, b, strict=True):
        assert one["data/digest"] == other["data/digest"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    bad = [sorted(map(str, written(recipe.parent / f"same-{name}"))) for name in "abc"]
    assert bad[0] == bad[1] == bad[2]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (2, 1)])
def test_past_the_limit_all_ranks_stop_at_the_same_step_with_the_list(
    recipe: Path, processes: int, workers: int
) -> None:
    name = f"limit-{processes}-{workers}"
    words = [f"run.name={name}", "train.steps=5", "data.max_bad_samples=5", f"data.workers={workers}"]
    outcomes = train(recipe, *words, processes=processes, code=1)
    run = recipe.parent / name
    assert len(metrics(run)) == 1
    total = len(written(run))
    for outcome in outcomes:
        last = outcome.error_lines[-1]
        assert f"{total} samples could not be read by step 2, more than data.max_bad_samples=5 " in last
        assert "and than data.max_bad_share=0.001 of 72: " in last
        assert all(key in last for key in BROKEN)
        assert "(it2i, shard-000001.tar: " in last
        assert "bad_samples.jsonl lists them" in last
        assert "Traceback" not in outcome.err
    # With a higher limit the run resumes.
    train(recipe, f"run.name={name}", "train.steps=2", processes=processes)
    assert [line["data/replaced"] for line in metrics(run)] == [3, 6]


def test_a_share_of_bad_samples_is_allowed_whatever_their_number(recipe: Path) -> None:
    """3 or 4 samples of 36 cannot be read in each step; the count alone would end the run at step 1."""
    words = ["run.name=share", "train.steps=3", "data.max_bad_samples=0"]
    train(recipe, *words, "data.max_bad_share=0.5")
    assert len(metrics(recipe.parent / "share")) == 3
    outcome = train(recipe, *words, "run.name=share-0", "data.max_bad_share=0", code=1)[0]
    assert "more than data.max_bad_samples=0 and than data.max_bad_share=0.0 of 36: " in outcome.error_lines[-1]


def test_a_rank_whose_packs_cannot_be_read_takes_the_others_with_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The rank of slot 0 finds no readable image; the other rank must not wait for its counts."""
    folder = write_shards(tmp_path / "set", every_task(2, side=64))
    for key in ("q000", "q001", "p000", "p001", "e000", "e001"):
        damage(folder / "shard-000000.tar", f"{key}.img0.png")
    data: dict[str, Any] = {"sources": [{"path": str(folder)}], "slots": 2, "samples_per_step": 6}
    recipe = make_recipe(tmp_path, mix={"i2t": 1, "t2i": 1, "it2i": 1}, data=data)
    for outcome in train(recipe, "train.steps=2", processes=2, code=1, timeout_s=60):
        assert "step 1: no sample of slot" in outcome.error_lines[-1]
        assert "Traceback" not in outcome.err


def test_a_resumed_run_neither_forgets_nor_repeats_a_line(recipe: Path) -> None:
    """The run saves after step 2 and fails in step 3: the lines of step 3 are written again by the resumed run."""
    train(recipe, "run.name=resumed", "train.steps=5", "data.max_bad_samples=8", code=1)
    run = recipe.parent / "resumed"
    assert {bad["step"] for bad in written(run)} == {1, 2, 3}
    with open(run / "bad_samples.jsonl", "a") as file:
        file.write('{"step": 3, "key": "torn')
    train(recipe, "run.name=resumed", "train.steps=5")
    train(recipe, "run.name=straight", "train.steps=5")
    assert written(run) == written(recipe.parent / "straight")
    assert [line["data/replaced"] for line in metrics(run)] == [3, 6, 9, 12, 15]


def test_emma_data_check_finds_what_changed_and_what_cannot_be_opened(folder: Path) -> None:
    outcome = run_command("check", str(folder), module="data_pipelines", code=1)
    assert "record q003 differs from its crc32" in outcome.out
    assert "record e007 differs from its crc32" in outcome.out
    assert "image p005.img0.png cannot be read" in outcome.out
