"""Advice of a plan: what it proposes fits by the plan of the change, and communication in closed form."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import yaml

from emma_train.errors import UserError
from emma_train.plan import Plan
from emma_train.plan.advice import problems, ways_to_fit, ways_to_speed
from emma_train.plan.cards import card_name, node_bandwidth
from emma_train.plan.checkpoint_size import WRITE_BYTES_S, checkpoint_size
from emma_train.plan.roofline import step_seconds
from emma_train.plan.traffic import USABLE, Network, traffic
from tests.unit.emma_train.plan.test_plan import FULL, plan, toy

STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4_expert", "stage4_router")
FAST, SLOW = Network(400.0, 8), Network(50.0, 8)
MEMORY = {"a100-80g": 79.3, "h100-80g": 79.2, "h200-141g": 139.8}


@cache
def full_size(stage: str) -> Plan:
    return plan(FULL / f"{stage}.yaml")


def applied(before: Plan, way: str) -> Plan:
    """The plan of a proposed change, from the text that a user reads."""
    engine = {key: yaml.safe_load(value) for key, value in re.findall(r"engine\.(\w+)=(\w+)", way)}
    data = {key: int(value) for key, value in re.findall(r"data\.(\w+)=(\d+)", way)}
    count = re.search(r"(\d+) (?:GPUs|x ([\w-]+))", way)
    assert engine or data or count, way
    changes: dict[str, Any] = dict(data)
    if count:
        changes |= {"num_gpus": int(count[1]), "gpu_name": count[2] or before.gpu_name}
    return before.with_changes(engine, **changes)


@pytest.mark.parametrize("gpu", MEMORY)
@pytest.mark.parametrize("gpus", [8, 64, 256])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_proposed_fits(stage: str, gpus: int, gpu: str) -> None:
    planned = full_size(stage).with_changes(num_gpus=gpus, gpu_name=gpu)
    ways = ways_to_fit(planned)
    assert planned.fits() or ways
    for way in ways:
        changed = applied(planned, way)
        assert problems(changed) == [], way
        full = changed.peak(changed.num_gpus, changed.recipe.data.pack_tokens)
        assert full < 2**30 * MEMORY.get(changed.gpu_name, 999), way
    for network in (FAST, SLOW):
        for way in ways_to_speed(planned, network):
            changed = applied(planned, way)
            assert problems(changed) == [], way
            assert traffic(changed, network).step_s < traffic(planned, network).step_s, way


def test_a_changed_plan_is_the_plan_of_the_changed_recipe() -> None:
    changed = full_size("stage2").with_changes({"replicate": 2}, pack_tokens=9000, num_gpus=32, gpu_name="h200-141g")
    anew = plan(FULL / "stage2.yaml", "engine.replicate=2", "data.pack_tokens=9000", gpus=32, gpu="h200-141g")
    assert changed.peak(32, 9000) == anew.peak(32, 9000)
    assert traffic(changed, SLOW) == traffic(anew, SLOW)
    assert full_size("stage2").recipe.engine.replicate == 1


def test_compiled_layers_are_the_first_remedy_and_layers_computed_again_the_next() -> None:
    eager, compiled = (plan(FULL / "stage1.yaml", f"engine.compile={on}", gpus=8) for on in ("false", "true"))
    assert problems(eager) == []
    (problem,) = problems(eager.with_changes(pack_tokens=8192))
    assert problem.split("what would fit: ")[1].split(", or ")[0] == "engine.compile=true"
    (problem,) = problems(compiled.with_changes(pack_tokens=9216))
    first = problem.split("what would fit: ")[1].split(", or ")[0]
    assert re.fullmatch(r"engine\.activation_checkpointing=selective \(steps take \+\d+%\)", first)


@pytest.mark.parametrize(("stage", "gpus", "replicas"), [("stage1", 8, 1), ("stage1", 64, 8), ("stage2", 64, 8)])
def test_pretraining_fits_80_gb_as_shipped(stage: str, gpus: int, replicas: int) -> None:
    assert problems(plan(FULL / f"{stage}.yaml", f"engine.replicate={replicas}", gpus=gpus)) == []


def test_traffic_of_fsdp_in_closed_form() -> None:
    planned = full_size("stage1")
    sizes = planned.sizes
    # 256 slots: 4 packs a GPU. All is gathered for forward, and all but the root and the last layer, a deep one, again.
    weights = 2 * (2 * sizes.stored - sizes.root - sizes.units[-1])
    gathered, reduced = 4 * weights, 4 * 4 * sizes.trained
    speed = 8 * 400e9 / 8 * USABLE  # the eight cards of a node
    now = traffic(planned, FAST)
    assert now.communication_s == pytest.approx((gathered + reduced) * 63 / 64 / speed)
    assert now.computing_s == step_seconds(planned, planned.loads[0])
    assert traffic(full_size("stage1"), SLOW).communication_s == pytest.approx(8 * now.communication_s)
    in_node = traffic(plan(FULL / "stage1.yaml", gpus=8), SLOW)
    packs = 32 * (weights + 4 * sizes.trained)
    assert in_node.communication_s == pytest.approx(packs * 7 / 8 / node_bandwidth("h100-80g"))
    replicas = traffic(plan(FULL / "stage1.yaml", "engine.replicate=8", gpus=64), SLOW)
    within = 4 * (weights + 4 * sizes.trained) * 7 / 8 / node_bandwidth("h100-80g")
    between = 2 * 4 * sizes.trained / 8 * 7 / 8 / (50e9 / 8 * USABLE)
    assert replicas.communication_s == pytest.approx(within + between)
    assert traffic(toy("stage1"), SLOW).communication_s == 0


def test_a_slow_network_calls_for_replicas_that_fit() -> None:
    planned = full_size("stage1")
    assert traffic(planned, FAST).hidden
    assert not any("replicate" in way for way in ways_to_speed(planned, FAST))
    assert not traffic(planned, SLOW).hidden
    ways = ways_to_speed(planned, SLOW)
    assert "engine.replicate=8" in ways[0]
    changed = applied(planned, ways[0])
    assert problems(changed) == []
    assert traffic(changed, SLOW).step_s < traffic(planned, SLOW).step_s


def test_longer_packs_where_memory_allows_and_compiled_layers_make_steps_shorter() -> None:
    shipped = full_size("stage1").with_changes(num_gpus=8)
    assert ways_to_speed(shipped, FAST) == []  # packs twice as long do not fit 80 GB
    larger = shipped.with_changes(gpu_name="h200-141g")
    kept = "engine.reshard_after_forward=false"
    assert ways_to_speed(larger, FAST) == [kept, "data.slots=128 data.pack_tokens=14336"]
    assert ways_to_speed(full_size("stage1"), FAST) == [kept]  # on 64 GPUs there is room for it
    eager = larger.with_changes({"compile": False})
    assert ways_to_speed(eager, FAST)[0] == "engine.compile=true"


def test_checkpoints_hold_what_trains_and_once_what_does_not() -> None:
    adamw = checkpoint_size(full_size("stage1"))
    planned = full_size("stage1")
    assert adamw.checkpoint == 16 * planned.sizes.trained
    assert adamw.write_s == adamw.checkpoint / WRITE_BYTES_S
    muon = checkpoint_size(plan(FULL / "stage1.yaml", "optimizer.kind=muon", "ema.decay=0"))
    trained, matrices = planned.sizes.trained, plan(FULL / "stage1.yaml", "optimizer.kind=muon").sizes.muon
    assert muon.checkpoint == 12 * trained - 4 * matrices
    router = plan(FULL / "stage4_router.yaml")
    assert checkpoint_size(router).frozen == 4 * (router.sizes.stored - router.sizes.trained)
    kept = replace(planned.recipe.train, keep=5)
    planned = planned.with_changes()
    planned.recipe = replace(planned.recipe, train=kept)
    assert checkpoint_size(planned).total == 6 * adamw.checkpoint + adamw.frozen


def test_the_beginning_of_a_cards_name_is_enough() -> None:
    assert card_name("h200") == "h200-141g"
    assert card_name("h100-80g") == "h100-80g"
    with pytest.raises(UserError, match=r"--gpu a100: may be a100-40g or a100-80g"):
        card_name("a100")
