"""A pipeline trains its stages one after another and resumes wherever it was stopped."""

import signal
import time
from pathlib import Path

import pytest

from tests.distributed.spawn import kill_all, run_command, start_command
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored, train

STAGES = {"stage0": 2, "stage1": 16, "stage2": 3}


@pytest.fixture(scope="module")
def pipeline(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages; the last in two phases."""
    folder = tmp_path_factory.mktemp("pipeline")
    for stage, steps in STAGES.items():
        make_recipe(folder, stage, train={"steps": steps, "save_every": 4, "log_every": 1, "sample_from": ""})
    phases = "[{name: a, steps: 1, mix: {i2t: 1, t2i: 1}}, {name: b, steps: 2, mix: {i2t: 1, t2i: 1, it2i: 1}}]"
    text = (folder / "stage2.yaml").read_text().replace("data:\n", f"data:\n  phases: {phases}\n")
    (folder / "stage2.yaml").write_text(text)
    path = folder / "pipeline.yaml"
    path.write_text(f"pipeline: [{', '.join(f'{s}.yaml' for s in STAGES)}]\nrun: {{root: {folder}, name: straight}}\n")
    return path


@pytest.fixture(scope="module")
def straight(pipeline: Path) -> tuple[Path, str]:
    (outcome,) = train(pipeline)
    return pipeline.parent / "straight", outcome.err


def test_every_stage_has_its_run_folder_and_starts_from_the_one_before(straight: tuple[Path, str]) -> None:
    run, log = straight
    for stage, steps in STAGES.items():
        assert [line["step"] for line in learnt(run / stage)] == list(range(1, steps + 1))
    assert f"from {run / 'stage0'}: loaded" in log
    assert f"from {run / 'stage1'}: loaded" in log
    assert "loss/it2i" not in learnt(run / "stage2")[0]
    assert "loss/it2i" in learnt(run / "stage2")[1]


def test_a_pipeline_that_is_stopped_in_the_middle_ends_as_if_it_were_not(
    pipeline: Path, straight: tuple[Path, str]
) -> None:
    run = pipeline.parent / "stopped"
    command = start_command("train", str(pipeline), "run.name=stopped")
    deadline = time.monotonic() + 90
    log = run / "stage1" / "metrics.jsonl"
    try:
        while not (log.exists() and log.read_text().count("\n") >= 5):
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        command.send_signal(signal.SIGTERM)
        command.communicate(timeout=60)
    finally:
        kill_all(command.pid)
    assert command.returncode == 75
    assert not (run / "stage2").exists()
    finished = (run / "stage0" / "metrics.jsonl").stat().st_mtime_ns
    outcome = run_command("train", str(pipeline), "run.name=stopped")
    assert f"{run / 'stage0'} is complete: nothing to do" in outcome.err
    assert (run / "stage0" / "metrics.jsonl").stat().st_mtime_ns == finished
    for stage, steps in STAGES.items():
        assert learnt(run / stage) == learnt(straight[0] / stage)
        ends = [stored(checkpoint(root / stage, steps)) for root in (run, straight[0])]
        assert differences(*ends) == []


def test_a_mistake_in_a_late_stage_is_told_before_the_first_starts(pipeline: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        text = (pipeline.parent / f"{stage}.yaml").read_text()
        (tmp_path / f"{stage}.yaml").write_text(text.replace("samples_per_step: 24", "samples_per_step: 25"))
    text = (pipeline.parent / "stage0.yaml").read_text()
    (tmp_path / "stage0.yaml").write_text(text)
    path = tmp_path / "pipeline.yaml"
    path.write_text(pipeline.read_text().replace(str(pipeline.parent), str(tmp_path)))
    (outcome,) = train(path, "run.name=never", code=2)
    (line,) = outcome.error_lines
    assert "stage1.yaml: data.samples_per_step is 25" in line
    assert not (tmp_path / "never").exists()
