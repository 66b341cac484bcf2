"""The shipped pipeline with a few steps per stage, under both engines, as a user starts it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from emma_train.model.parameter_groups import group_of
from emma_train.stages.stage import STAGES
from tests.distributed.spawn import run_command
from tests.helpers import ROOT
from tests.runs import checkpoint, stored

TINY = ROOT / "recipes" / "tiny"
STEPS = 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/tiny/pipeline.yaml with three steps per stage; samples, averages and phases stay."""
    folder = tmp_path_factory.mktemp("tiny")
    for stage in STAGES:
        values: dict[str, Any] = yaml.safe_load((TINY / f"{stage}.yaml").read_text())
        values["extends"] = str(TINY / "base.yaml")
        values["train"] = {"steps": STEPS, "num_samples": 1, "log_every": 1}
        values["validate"] = {"num_samples": 4, "num_questions": 4}
        for phase in values.get("data", {}).get("phases", []):
            phase["steps"] = 1
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    (folder / "pipeline.yaml").write_text((TINY / "pipeline.yaml").read_text())
    return folder / "pipeline.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("engine.kind=fsdp",), *(("engine.kind=deepspeed", f"engine.zero_stage={n}") for n in (2, 3))],
    ids=lambda overrides: "-".join(o.split("=")[1] for o in overrides),
)
def test_every_engine_runs_the_whole_pipeline(pipeline: Path, overrides: tuple[str, ...]) -> None:
    name = "-".join(o.split("=")[1] for o in overrides)
    settings = (f"run.root={pipeline.parent}", f"run.name={name}", *overrides)
    outcome = run_command("train", str(pipeline), *settings, processes=2, timeout_s=280)
    for stage in STAGES:
        run = pipeline.parent / name / stage
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["frozen_verified"], summary["skipped_steps"]) == (STEPS, True, 0)
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == STEPS and all(0 < loss < 20 for loss in losses)
        if stage != "stage4_router":
            assert list((run / "samples").glob("step-*/samples.json"))
    assert (pipeline.parent / name / "report.html").exists()
    # DeepSpeed keeps frozen weights in bf16 only.
    before, after = (stored(checkpoint(pipeline.parent / name / stage, STEPS)) for stage in ("stage3", "stage4_expert"))
    frozen = [n for n in after if n.startswith("model.") and group_of(n.removeprefix("model.")) != "stem_expert"]
    assert len(frozen) > 100
    for tensor in frozen:
        assert torch.equal(after[tensor], before[tensor.replace("model.", "ema.", 1)]), tensor
    assert "Warning" not in outcome.err
