"""Checksums of a micro-step: of every gradient, and without a trace in the step that follows."""

from typing import Any

import pytest
import torch

from tests.distributed.replay_ranks import replayed_step
from tests.distributed.spawn import run_ranks
from tests.helpers import tiny_recipe

SETTINGS: list[dict[str, Any]] = [
    {},
    {"engine__reduce_every_micro_step": False, "engine__activation_checkpointing": "full"},
    {"engine__replicate": 2, "engine__frozen": "replicated"},
]


@pytest.mark.parametrize("settings", [SETTINGS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS[1:])])
def test_every_gradient_has_a_checksum_and_none_remains(settings: dict[str, Any]) -> None:
    recipe = tiny_recipe(**settings)
    replayed = [outcome.value for outcome in run_ranks(2, replayed_step, recipe, "mixed", True)]
    plain = run_ranks(2, replayed_step, recipe, "mixed", False)[0].value
    for rank in replayed:
        assert rank["checksums"].keys() == rank["trained"] | {"loss"}
        assert len(rank["checksums"]) > 50
        assert rank["step"]["norm"] == plain["step"]["norm"]
        gradients = rank["step"]["gradients"]
        assert gradients.keys() == plain["step"]["gradients"].keys() > set()
        assert all(torch.equal(value, plain["step"]["gradients"][name]) for name, value in gradients.items())
    # Both have the same pack, and so the same gradients before they are summed.
    assert replayed[0]["checksums"] == replayed[1]["checksums"]
