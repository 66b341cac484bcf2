"""A run folder holds what the documentation promises: files, metric names, a report, a checkpoint."""

import json
import math
import time
from pathlib import Path

import pytest
from PIL import Image

from emma_train.config.load import config_hash, load_recipe
from tests.distributed.spawn import run_command
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import metrics

STEPS = 4
PROMISED = {
    "step", "stage", "loss", "loss/i2t", "loss/t2i", "lr", "grad_norm", "samples/i2t", "samples/t2i", "samples/it2i",
    "tokens/total", "tokens/padding", "tokens_per_s", "memory_gib", "step_s", "data/wait_s", "data/digest",
    "data/straggler", "data/skipped", "checkpoint/stall_s", "time_unix",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m emma_train train` with sample images, then `report`."""
    root = tmp_path_factory.mktemp("run")
    sampling = {"steps": STEPS, "sample_from": str(ASSETS / "emoji" / "heldout_drawings"), "num_samples": 1}
    recipe = make_recipe(root, train={"save_every": 2, "log_every": 1, **sampling})
    run_command("train", str(recipe), "run.name=one")
    run_command("report", str(root / "one"))
    return root / "one"


def test_the_run_folder_has_every_promised_file(run: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "checkpoints/latest",
    ):
        assert (run / name).stat().st_size > 0, name
    assert (run / "logs").is_dir()
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:08d}"
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002", "step-00000004"]
    images = list((run / "samples" / f"step-{STEPS:08d}").glob("*.png"))
    assert images
    for path in images:
        with Image.open(path) as image:
            assert min(image.size) >= 32


def test_metrics_have_the_promised_names_and_believable_values(run: Path) -> None:
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= PROMISED
        assert "loss/it2i" not in line  # the task is not in the mix
        assert "mfu" not in line  # the peak FLOPs of a CPU are unknown
        assert "vision/stem_share" not in line  # there is no STEM expert yet
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert (line["samples/i2t"], line["samples/t2i"], line["samples/it2i"]) == (12, 12, 0)
        assert line["tokens_per_s"] == pytest.approx(line["tokens/total"] / line["step_s"])
        assert 1.0 <= line["data/straggler"] < 1.2
        assert 0 <= line["data/wait_s"] <= line["step_s"]
        assert 0 < time.time() - line["time_unix"] < 3600
        assert line["checkpoint/stall_s"] >= 0
        if line["step"] % 2 == 0:
            assert line["checkpoint/stall_s"] > 0
    # An untrained model predicts at chance: ln 1024 = 6.93.
    assert lines[0]["loss/i2t"] == pytest.approx(math.log(1024), abs=0.5)
    assert lines[0]["loss"] == pytest.approx(0.25 * lines[0]["loss/i2t"] + lines[0]["loss/t2i"], rel=1e-6)
    assert [line["lr"] for line in lines] == pytest.approx([lines[3]["lr"] * f for f in (1 / 3, 2 / 3, 1, 1)])


def test_the_written_recipe_is_the_resolved_one(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    recipe = load_recipe(run / "config.yaml")
    assert text.startswith(f"# hash {config_hash(recipe)}\n")
    assert (recipe.run.name, recipe.train.steps, recipe.data.slots) == ("one", STEPS, 6)


def test_the_environment_says_with_what_and_where(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert "torch" in environment["versions"]
    assert "train" in environment["command"]


def test_inspect_says_what_the_checkpoint_is(run: Path) -> None:
    meta = json.loads(run_command("inspect", str(run), "--json").out)
    assert (meta["stage"], meta["step"], meta["world_size"]) == ("stage1", STEPS, 1)
    assert meta["data"]["step"] == STEPS
    assert meta["done"]["seen"] == {"i2t": 12 * STEPS, "t2i": 12 * STEPS, "it2i": 0, "recon": 0}
    assert meta["config_hash"] in (run / "config.yaml").read_text().splitlines()[0]
    assert sum(meta["trainable"].values()) == json.loads((run / "summary.json").read_text())["parameters"]
    printed = run_command("inspect", str(run)).out
    assert "stage1" in printed
    assert f"{STEPS} of {STEPS}" in printed


def test_the_report_is_one_page_without_anything_to_load(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert 'src="http' not in page
    assert "data:image/" in page


def test_training_again_finds_nothing_to_do(run: Path, make_recipe: MakeRecipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    outcome = run_command("train", str(run.parent / "stage1.yaml"), "run.name=one")
    assert "complete: nothing to do" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_two_processes_under_torchrun_write_one_run_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    outcome = run_command("train", str(recipe), "train.steps=3", "run.name=two", processes=2)
    lines = metrics(tmp_path / "two")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= PROMISED for line in lines)
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"] == 2
    assert "[1] " not in outcome.err  # only rank 0 logs
    assert len(list((tmp_path / "two" / "checkpoints" / "step-00000003" / "weights").glob("*.distcp"))) == 2
