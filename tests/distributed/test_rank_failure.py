"""When a rank dies, fails or hangs, the others end and name it."""

import time
from pathlib import Path

import pytest

from emma_train.engine.rank_failure import describe_failure
from tests.distributed.collective_ranks import timeouts_in_turn
from tests.distributed.ranks import end_in_step, out_of_step
from tests.distributed.spawn import run_ranks
from tests.helpers import recipe_values, tiny_recipe, write_recipe

STEP_TIMEOUT_S = 6


@pytest.mark.parametrize(
    ("how", "victim", "codes", "said"),
    [
        ("killed", 1, [1, -9, 1], "emma-train train: rank 1 of 3 died or hangs: no answer in"),
        ("killed", 0, [-9, 1, 1], "emma-train train: rank 0 of 3 died: the store that it keeps does not answer"),
        ("failed", 2, [1, 1, 1], "emma-train train: rank 2 of 3 failed: a bad day"),
        pytest.param(
            "hangs", 1, [1, 1, 1], "emma-train train: rank 1 of 3 died or hangs: no answer in", marks=pytest.mark.slow
        ),
    ],
)
def test_the_others_end_and_name_the_rank(tmp_path: Path, how: str, victim: int, codes: list[int], said: str) -> None:
    settings = {"engine__step_timeout_s": STEP_TIMEOUT_S, "data__slots": 3, "train__steps": 9, "train__save_every": 99}
    values = recipe_values("stage1", run__root=str(tmp_path), run__name="lost", **settings)
    recipe = write_recipe(tmp_path / "lost.yaml", values)
    started = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        # A rank that hangs ends up to 14 s after the first: a beat, a look at what it said, and its grace.
        run_ranks(3, end_in_step, ["train", str(recipe)], victim, 3, how, timeout_s=90, grace_s=30)
    message = str(failure.value)
    assert f"exit codes {codes}" in message
    assert message.count(said) == (2 if victim == 0 else 1), message
    if how == "hangs":
        assert "rank 1 of 3 hangs: is at " in message and "rank 0 of 3 died" not in message
        # The rank writes its stack when its step takes too long.
        assert "Timeout (0:00:06)!" in message and "in ending" in message
        assert time.monotonic() - started >= STEP_TIMEOUT_S


def test_messages_of_ranks_become_one_line() -> None:
    contact = "lost contact"
    assert describe_failure({0: contact, 2: contact}, 3).startswith("rank 1 of 3 died or hangs")
    assert describe_failure({0: contact, 1: "out of memory", 2: contact}, 3) == "rank 1 of 3 failed: out of memory"
    assert describe_failure({5: contact}, 20).startswith("ranks 0, 1, 2, 3, 4, 6, 7, 8 and 11 more of 20 died or hang")
    assert describe_failure({0: contact, 1: contact}, 2) == "all 2 ranks lost contact at once, as when a network fails"


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_ranks_that_run_different_modules_stop_and_name_them(kind: str) -> None:
    settings = {"engine__debug_lockstep": True, "engine__kind": kind, "engine__zero_stage": 3}
    for outcome in run_ranks(3, out_of_step, tiny_recipe(**settings), 1):
        assert outcome.value == (
            "ranks are out of step after vision.layers.1: rank 1 at vision.post_layernorm, "
            "ranks 0 2 at vision.layers.1.layer_norm1"
        )


@pytest.mark.parametrize("victim", [None, 0])
def test_ranks_in_step_go_on(victim: int | None) -> None:
    """Watching changes no result, and a single rank is never out of step."""
    recipe = tiny_recipe(engine__debug_lockstep=True)
    size = 2 if victim is None else 1
    assert [outcome.value for outcome in run_ranks(size, out_of_step, recipe, victim)] == [""] * size


def test_a_step_may_take_less_time_than_a_start_or_a_save() -> None:
    (outcome,) = run_ranks(1, timeouts_in_turn)
    assert outcome.value == [seconds for seconds in (50, 5, 50, 5, 50) for _ in range(2)]
