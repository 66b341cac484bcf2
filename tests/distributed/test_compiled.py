"""torch.compile of every layer, under FSDP and with activation checkpointing: the same losses, in a few graphs."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.engines import REFERENCE, Way, distance, run, stage_recipe
from tests.runs import metrics

STEPS = 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "settings",
    [
        ("engine.activation_checkpointing=none",),
        ("engine.activation_checkpointing=full",),
        ("engine.kind=deepspeed", "engine.zero_stage=2"),
    ],
    ids=lambda settings: settings[-1],
)
def test_compiled_layers_train_the_same(tmp_path: Path, settings: tuple[str, ...]) -> None:
    recipe = stage_recipe(tmp_path, "stage1", None, STEPS)
    reference = run(recipe, REFERENCE, "reference")
    compiled = run(recipe, Way("", 2), "compiled", "engine.compile=true", *settings, timeout_s=800)
    difference = distance(compiled, reference, STEPS)
    assert difference.loss <= 1e-5
    assert difference.weights <= 1e-5
    again = [line["compile/recompiles"] for line in metrics(compiled)]
    assert again[-1] == again[-2]
