"""Peak memory per rank falls with the number of ranks as `plan` predicts, under every engine."""

from typing import Any

import pytest

from emma_train.plan.arithmetic import Plan
from tests.distributed.ranks import training_memory
from tests.distributed.spawn import run_ranks
from tests.helpers import DECODER, tiny_recipe

WIDE = {
    **DECODER,
    "hidden": 512,
    "num_layers": 8,
    "num_shared_layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
}
KINDS = ["i2t", "t2i", "it2i", "text"]
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "whole gradients": {"engine__reduce_every_micro_step": False},
    "all gathered, bf16": {"engine__reshard_after_forward": False, "engine__precision": "bf16"},
    **{f"zero{n}": {"engine__kind": "deepspeed", "engine__zero_stage": n} for n in (1, 2, 3)},
    **{
        f"zero{n}, bf16": {"engine__kind": "deepspeed", "engine__zero_stage": n, "engine__precision": "bf16"}
        for n in (1, 2, 3)
    },
}


def relative(settings: dict[str, Any], size: int) -> float:
    """What the ranks take at most over what is predicted: 63 million parameters, so that packs weigh little."""
    recipe = tiny_recipe(model__decoder=WIDE, ema__decay=0.9, **settings)
    plan = Plan(recipe, "test", size, "h100-80g")
    assert 60e6 < plan.stored < 66e6
    measured = [outcome.value for outcome in run_ranks(size, training_memory, recipe, KINDS, timeout_s=240)]
    kept = plan.memory(plan.loads[0], size, max(tokens for _, tokens in measured)).kept
    # The autoencoder is there before the stage begins.
    predicted = sum(value for name, value in kept.items() if not name.startswith("autoencoder"))
    return max(peak for peak, _ in measured) / predicted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "size"), [*((engine, size) for engine in ENGINES for size in (1, 2)), ("fsdp", 4), ("zero3", 4)]
)
def test_ranks_take_what_is_planned(engine: str, size: int) -> None:
    assert relative(ENGINES[engine], size) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_two_replicas_of_two_shards_take_what_two_shards_take() -> None:
    assert relative({"engine__replicate": 2}, 4) == pytest.approx(1.0, abs=0.1)
