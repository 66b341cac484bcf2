"""Frozen parameters keep every bit: through all six stages, on two processes."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from emma_train.model.parameter_groups import group_of
from emma_train.stages.stage import STAGES
from tests.helpers import ASSETS, recipe_values, write_recipe
from tests.runs import checkpoint, stored, train

NAMES = list(STAGES)
STEPS = 3


@dataclass(frozen=True)
class StageRun:
    before: dict[str, torch.Tensor]
    """Weights that the stage started from: those of the previous stage (averages if it kept them)."""
    after: dict[str, torch.Tensor]
    summary: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageRun]:
    """All stages, one after another, three steps each; stages 1 and 3 keep averages."""
    root = tmp_path_factory.mktemp("chain")
    runs: dict[str, StageRun] = {}
    before: dict[str, torch.Tensor] = {}
    for number, name in enumerate(NAMES):
        settings: dict[str, Any] = {"run__root": str(root), "run__name": name, "train__steps": STEPS}
        settings |= {"data__slots": 2, "data__samples_per_step": 24, "data__pack_tokens": 1024}
        settings |= {"ema__decay": 0.5 if name in ("stage1", "stage3") else 0.0}
        if number:
            settings["init__from"] = str(root / NAMES[number - 1])
        if name == "stage4_expert":
            settings["data__sources"] = [{"path": str(ASSETS / "emoji" / "train"), "require_tags": ["stem"]}]
        recipe = write_recipe(root / f"{name}.yaml", recipe_values(name, **settings))
        log = train(recipe, processes=2)[0].err
        tensors = stored(checkpoint(root / name, STEPS))
        after = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        runs[name] = StageRun(before, after, json.loads((root / name / "summary.json").read_text()), log)
        before = {**after, **{k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}}
    return runs


@pytest.mark.parametrize("name", NAMES[1:])
def test_frozen_parameters_keep_every_bit(chain: dict[str, StageRun], name: str) -> None:
    run = chain[name]
    frozen = [n for n in run.after if group_of(n) not in STAGES[name].trainable]
    for parameter in frozen:
        if parameter in run.before:
            assert torch.equal(run.before[parameter], run.after[parameter]), parameter
    if name.startswith("stage4"):
        assert len(frozen) > 50


def test_stage_0_moves_the_und_adapter_and_nothing_else(chain: dict[str, StageRun]) -> None:
    """It starts from the seed, so its frozen parameters are those that the seed gives."""
    from emma_train.model.initial import initial_value

    for name, value in chain["stage0"].after.items():
        layers = 3 if name.startswith("vision.") else 4
        start = initial_value(name, value.shape, 0, layers)
        assert torch.equal(start, value) == (not name.startswith("und_adapter.")), name


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_trainable_parameter_moves(chain: dict[str, StageRun], name: str) -> None:
    run = chain[name]
    trainable = [n for n in run.after if group_of(n) in STAGES[name].trainable]
    assert trainable
    still = [n for n in trainable if n in run.before and torch.equal(run.before[n], run.after[n])]
    assert still == []


def test_the_stem_expert_starts_as_the_versatile_one_and_leaves_it(chain: dict[str, StageRun]) -> None:
    expert = chain["stage4_expert"].after
    clones = [n for n in expert if n.startswith("vision.stem_layers.0.")]
    assert clones
    for name in clones:
        twin = name.replace("vision.stem_layers.0.", "vision.layers.2.")
        assert torch.equal(expert[twin], chain["stage4_expert"].before[twin])
        difference = (expert[name] - expert[twin]).abs().max()
        # Three steps of AdamW at 1e-3 move a weight by 3e-3 at most.
        assert 0 < difference <= 3.1e-3, name


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_says_what_trained_and_that_the_rest_did_not(chain: dict[str, StageRun], name: str) -> None:
    run = chain[name]
    assert run.summary["frozen_verified"] is True
    assert run.summary["steps"] == STEPS
    sizes = dict.fromkeys(STAGES[name].trainable, 0)
    for parameter, value in run.after.items():
        if (group := group_of(parameter)) in sizes:
            sizes[group] += value.numel()
    assert run.summary["trainable"] == sizes
    assert run.summary["parameters"] == sum(value.numel() for value in run.after.values())
    frozen = [n for n in run.after if group_of(n) not in sizes]
    assert run.summary["frozen_tensors"] == len(frozen)


def test_a_hand_off_says_what_it_loaded_and_what_is_new(chain: dict[str, StageRun]) -> None:
    assert "loaded" not in chain["stage0"].log
    for name in ("stage1", "stage2", "stage3"):
        assert f"loaded {len(chain[name].before)} tensors" in chain[name].log
        assert "new" not in chain[name].log
    averaged = len(chain["stage1"].after)
    assert f"({averaged} of them averaged weights)" in chain["stage2"].log
    assert "(0 of them averaged weights)" in chain["stage3"].log
    assert "new, cloned: " in chain["stage4_expert"].log
    assert "of stem_expert" in chain["stage4_expert"].log
    assert "new, from the seed: " in chain["stage4_router"].log
    assert "of router" in chain["stage4_router"].log
