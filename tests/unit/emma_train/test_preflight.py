"""What is checked of a run before it starts or is queued."""

import os
import shutil
from pathlib import Path

import pytest

from emma_train.cli import main
from emma_train.config.load import load_stages
from emma_train.preflight import absent_inputs, working_folder
from tests.helpers import ROOT, tiny_recipe, write_export

TINY = ROOT / "recipes" / "tiny"


def test_absent_inputs_are_named_with_their_keys(tmp_path: Path) -> None:
    stages = load_stages(TINY / "pipeline.yaml", [])
    assert absent_inputs(stages, ROOT) == []
    assert absent_inputs(stages, tmp_path) == [
        "data.sources[0].path: recipes/tiny/assets/emoji/train/manifest.json is not there",
        "validate.sources[0].path: recipes/tiny/assets/emoji/heldout_drawings/manifest.json is not there",
        "validate.questions[0].path: recipes/tiny/assets/emoji/heldout_drawings/manifest.json is not there",
        "train.sample_from: recipes/tiny/assets/emoji/heldout_drawings/manifest.json is not there",
        "model.autoencoder.path: recipes/tiny/assets/autoencoder is not there",
        "data.tokenizer: recipes/tiny/assets/tokenizer is not there",
    ]
    unvalidated = load_stages(TINY / "stage1.yaml", ["validate.every=0"])
    assert not any(line.startswith("validate.") for line in absent_inputs(unvalidated, tmp_path))
    overrides = ["data.sources=[{path: s3://bucket/set}]", "init.from=runs/none"]
    assert absent_inputs(load_stages(TINY / "stage1.yaml", overrides), ROOT) == ["init.from: runs/none is not there"]


def test_paths_belong_to_the_current_folder_or_to_the_recipes_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TINY / "stage0.yaml"
    stages = load_stages(recipe, [])
    monkeypatch.chdir(ROOT)
    assert working_folder(recipe, stages) == ROOT
    monkeypatch.chdir(tmp_path)
    assert working_folder(recipe, stages) == ROOT
    shutil.copytree(TINY, tmp_path / "recipes" / "tiny")  # the same inputs in the folder where one stands
    assert working_folder(recipe, stages) == tmp_path
    elsewhere = load_stages(recipe, ["data.tokenizer=none"])
    monkeypatch.chdir(ROOT / "docs")
    assert working_folder(recipe, elsewhere) == ROOT / "docs"  # absent in both: the message is about where one stands


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, stdout and stderr of `launch`, from the repository; whatever it checks, nothing is started."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["launch", *words, f"run.root={tmp_path / 'runs'}"])
        os.chdir(ROOT)
        return (code, *capsys.readouterr())

    return run


@pytest.mark.seconds
def test_packs_that_the_ranks_cannot_share(launched) -> None:
    code, out, error = launched(str(TINY / "stage0.yaml"), "--nproc", "4", "--dry-run")
    assert (code, out) == (2, "")
    assert "4 GPUs cannot share data.slots=6 evenly; 3 or 6 can" in error
    code, _, error = launched("recipes/emma-4b/stage1.yaml", "--on", "slurm", "--nnodes", "3", "--dry-run")
    assert code == 2
    assert "24 GPUs cannot share data.slots=256 evenly; 16 or 32 can" in error


def test_memory_where_the_kind_of_gpu_is_given(launched) -> None:
    words = ["recipes/emma-4b/stage1.yaml", "--on", "slurm", "--dry-run"]
    assert launched(*words)[0] == 0
    code, _, error = launched(*words, "--gpu", "a100-40g")
    assert code == 2
    assert "a full pack needs" in error


def test_a_kind_of_gpu_without_8_bit_products(launched) -> None:
    words = [str(TINY / "stage1.yaml"), "--on", "slurm", "--dry-run", "--nproc", "1", "engine.fp8=rowwise"]
    assert launched(*words, "--gpu", "h100-80g")[0] == 0
    code, out, error = launched(*words, "--gpu", "a100-80g")
    assert (code, out) == (2, "")
    assert "engine.fp8 is rowwise, and a a100-80g lacks its 8-bit products; set off" in error


def test_absent_inputs_end_a_launch_and_warn_in_a_dry_run(launched, tmp_path: Path) -> None:
    words = [str(TINY / "stage0.yaml"), "--on", "slurm", "--gpus-per-node", "0", "data.tokenizer=none"]
    code, _, error = launched(*words)
    assert code == 2
    assert f"data.tokenizer: none is not there (relative paths belong to {ROOT})" in error
    assert not (tmp_path / "runs").exists()
    code, out, _ = launched(*words, "--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash")


@pytest.mark.seconds
def test_a_checkpoint_that_contradicts_the_recipe(launched, tmp_path: Path) -> None:
    words = ["recipes/tiny/stage0.yaml", "run.name=a", "train.steps=1", "train.sample_from=", "data.slots=1"]
    small = ["data.samples_per_step=8", "optimizer.kind=adamw"]
    assert main(["train", *words, *small, f"run.root={tmp_path / 'runs'}"]) == 0
    slurm = ["--on", "slurm", "--gpus-per-node", "0", "--dry-run"]
    assert launched(*words, *small, *slurm)[0] == 0
    code, _, error = launched(*words, *small, *slurm, "data.seed=7")
    assert code == 2
    assert "data.seed is 7 in the recipe and 0 in the checkpoint" in error
    # Initial weights that were removed since are not needed to go on, only to start.
    overrides = [*words[1:], *small, f"run.root={tmp_path / 'runs'}", f"init.from={tmp_path / 'gone'}"]
    assert absent_inputs(load_stages(TINY / "stage0.yaml", overrides), ROOT) == []
    started = load_stages(TINY / "stage0.yaml", [*overrides, "run.name=b"])
    assert absent_inputs(started, ROOT) == [f"init.from: {tmp_path / 'gone'} is not there"]


def test_a_stage_starts_from_an_export_too(launched, tmp_path: Path) -> None:
    """`emma-train import` writes an export."""
    write_export(tmp_path / "initial", tiny_recipe())
    words = [str(TINY / "stage0.yaml"), "--on", "slurm", "--gpus-per-node", "0", "--dry-run"]
    assert launched(*words, f"init.from={tmp_path / 'initial'}")[0] == 0
    (tmp_path / "initial" / "recipe.yaml").unlink()
    code, _, error = launched(*words, f"init.from={tmp_path / 'initial'}")
    assert code == 2
    assert f"{tmp_path / 'initial' / 'recipe.yaml'}: missing from this export" in error
    (tmp_path / "initial" / "meta.json").unlink()
    code, _, error = launched(*words, f"init.from={tmp_path / 'initial'}")
    assert code == 2
    assert f"init.from: {tmp_path / 'initial'} holds no valid checkpoint" in error


def test_a_job_without_time_to_train_is_refused(launched) -> None:
    words = [str(TINY / "stage0.yaml"), "--on", "slurm", "--gpus-per-node", "0"]
    code, _, error = launched(*words, "--time", "4:00")
    assert code == 2
    assert "it would never train; raise --time or lower --grace-s" in error
