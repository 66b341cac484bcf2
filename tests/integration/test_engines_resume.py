"""Under every engine, on two processes: a run interrupted twice ends like the uninterrupted one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from emma_train.stages.stage import STAGES
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored, train, train_until

STEPS = 5
ENGINES = {
    "fsdp": (),
    **{f"zero{n}": ("engine.kind=deepspeed", f"engine.zero_stage={n}") for n in (1, 2, 3)},
    "offloaded": ("engine.kind=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true"),
    "bf16": ("engine.precision=bf16",),
    "zero3-bf16": ("engine.kind=deepspeed", "engine.zero_stage=3", "engine.precision=bf16"),
}
CASES = [(engine, stage) for engine in ("fsdp", "zero3") for stage in STAGES]
CASES += [(engine, "stage1") for engine in ENGINES if engine not in ("fsdp", "zero3")]


@pytest.fixture(scope="module")
def parents(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one step for each stage to start from, by the name of that stage."""
    root, run_before = tmp_path_factory.mktemp("parents"), {}
    names = list(STAGES)
    for before, name in zip(names, names[1:], strict=False):
        init = {"init": {"from": str(run_before[before])}} if before in run_before else {}
        train(make_recipe(root, before, train={"steps": 1}, data=data_of(before), **init), f"run.name={before}")
        run_before[name] = root / before
    return run_before


def data_of(stage: str) -> dict[str, Any]:
    stem = {"sources": [{"path": str(ASSETS / "emoji" / "train"), "require_tags": ["stem"]}]}
    return {"slots": 2, **(stem if stage == "stage4_expert" else {})}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stage"), CASES)
def test_two_interruptions_change_not_a_bit(
    make_recipe: MakeRecipe, parents: dict[str, Path], tmp_path: Path, engine: str, stage: str
) -> None:
    init = {"init": {"from": str(parents[stage])}} if stage in parents else {}
    sections: dict[str, Any] = {"train": {"steps": STEPS, "log_every": 1}, "ema": {"decay": 0.9}, **init}
    sections["schedule"] = {"kind": "cosine", "warmup_steps": 2, "min_ratio": 0.1}
    recipe = make_recipe(tmp_path, stage, data=data_of(stage), **sections)
    train(recipe, "run.name=straight", *ENGINES[engine], processes=2)
    for stop in (1, 3):
        train_until(recipe, stop, "run.name=twice", *ENGINES[engine], processes=2)
    train(recipe, "run.name=twice", *ENGINES[engine], processes=2)
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    assert len(learnt(twice)) == STEPS
    assert learnt(twice) == learnt(straight)
    one, other = stored(checkpoint(twice, STEPS)), stored(checkpoint(straight, STEPS))
    assert {tensor.split(".")[0] for tensor in one} == {"model", "optimizer", "ema"}
    assert differences(one, other) == []
