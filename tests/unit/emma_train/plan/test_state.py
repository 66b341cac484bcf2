"""Memory that each engine keeps for a toy model, in closed form."""

from dataclasses import replace
from typing import Any

import pytest

from emma_train.plan.state import Sizes, exchange_memory, state_memory
from tests.helpers import tiny_recipe

SIZES = Sizes(stored=1000, trained=400, units=(100, 200, 250), frozen_units=100, unused=50)
"""The root has 400."""


def kept(world: int, **settings: Any) -> dict[str, float]:
    return state_memory(tiny_recipe(ema__decay=0.9, **settings), SIZES, world)


def test_replicas_hold_what_the_ranks_of_one_replica_hold() -> None:
    assert kept(8, engine__replicate=2) == kept(4)
    assert kept(8)["weights, fp32 shard"] == 4 * 1000 / 8
    assert kept(8)["Adam moments, fp32 shards"] == 8 * 400 / 8


def test_replicated_frozen_units_are_whole_and_the_rest_is_not() -> None:
    assert kept(8, engine__frozen="replicated")["weights, fp32 shard"] == 4 * 900 / 8 + 4 * 100


def test_gathered_are_the_root_and_two_units_or_all_that_runs() -> None:
    assert kept(8)["gathered weights"] == 4 * (400 + 200 + 250)
    assert kept(8, engine__reshard_after_forward=False)["gathered weights"] == 4 * 950
    assert kept(8, engine__precision="bf16")["gathered weights"] == 2 * (400 + 200 + 250)


def test_whole_gradients_give_way_to_shards() -> None:
    memory = kept(2, engine__reduce_every_micro_step=False)
    assert memory["gradients, fp32 whole"] == 4 * 400
    assert "gradients, fp32 shard" not in memory
    # Four slots on four ranks: there is one micro-batch, and nothing to hold back.
    assert kept(4, engine__reduce_every_micro_step=False)["gradients, fp32 shard"] == 4 * 400 / 4


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_host_memory_takes_weights_and_optimizer_state(kind: str) -> None:
    names = ("Adam moments", "average", "weights, fp32 shard", "weights that train")
    on_device = kept(4, engine__kind=kind, engine__offload_optimizer=True)
    assert {v for n, v in on_device.items() if n.startswith(names)} == {0}
    assert any(v for n, v in on_device.items() if not n.startswith(names))


def test_averages_may_be_in_host_memory() -> None:
    assert kept(4)["average (EMA), fp32 shard"] == 400
    assert kept(4, ema__device="cpu")["average (EMA), fp32 shard"] == 0


@pytest.mark.parametrize(("stage", "weights", "gradients"), [(1, 4000, 1600), (2, 4000, 400), (3, 1000, 400)])
def test_zero_divides_more_with_every_stage(stage: int, weights: int, gradients: int) -> None:
    memory = kept(4, engine__kind="deepspeed", engine__zero_stage=stage)
    assert memory["weights to compute with"] == weights
    assert memory["gradients, fp32 " + ("whole" if stage == 1 else "part")] == gradients
    assert memory["Adam moments, fp32 parts"] == 800
    assert ("gathered weights" in memory) == (stage == 3)


def test_muon_has_one_moment_and_sends_its_matrices() -> None:
    sizes = replace(SIZES, muon=300)
    for kind, parts in (("fsdp", "shards"), ("deepspeed", "parts")):
        memory = state_memory(tiny_recipe(engine__kind=kind), sizes, 4)
        assert memory[f"Adam moments, fp32 {parts}"] == 8 * 100 / 4
        assert memory[f"Muon's momentum, fp32 {parts}"] == 4 * 300 / 4
    # Parts out and back, and the results of the owner's matrices.
    assert exchange_memory(tiny_recipe(), sizes, 4) == 2 * 300 * 3 / 4
    assert exchange_memory(tiny_recipe(optimizer__muon__dtype="fp32", engine__replicate=2), sizes, 4) == 4 * 300 * 5 / 4
    assert exchange_memory(tiny_recipe(), SIZES, 4) == 0
